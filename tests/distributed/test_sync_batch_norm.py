"""BatchNorm over the images of all ranks."""

import pytest
import torch
from torch import Tensor, nn

from llamagen.distributed.sync_batch_norm import SyncBatchNorm2d
from tests.golden import normal_input
from tests.ranks import run_on_ranks


def random_images() -> Tensor:
    return normal_input("bn", (4, 3, 5, 6)) * 3 + 40


def filled() -> SyncBatchNorm2d:
    norm = SyncBatchNorm2d(3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 1.0, -2.0]))
        norm.bias.copy_(torch.tensor([0.0, 3.0, -1.0]))
    return norm


def one_rank(rank: int) -> dict[str, Tensor]:
    norm = filled()
    x = random_images()[2 * rank : 2 * rank + 2]
    norm(x * 2 + 1)
    x = x.clone().requires_grad_()
    y = norm(x)
    # The loss of the global batch is the mean of the ranks' losses.
    weights = normal_input("loss", (4, 3, 5, 6))[2 * rank : 2 * rank + 2]
    (y * weights).pow(3).mean().backward()
    assert x.grad is not None
    assert norm.weight.grad is not None
    norm.eval()
    results = {"y": y.detach(), "x": x.grad, "gradient": norm.weight.grad, "eval": norm(x).detach()}
    return {**results, **norm.state_dict(), "sixteen bits": running_mean_in_sixteen_bits(rank)}


def running_mean_in_sixteen_bits(rank: int) -> Tensor:
    norm = filled().to(torch.bfloat16)
    norm(random_images()[2 * rank : 2 * rank + 2].bfloat16())
    assert norm.running_mean is not None
    return norm.running_mean


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """Results of two ranks."""
    return run_on_ranks(one_rank, tmp_path_factory.mktemp("ranks"))


def test_two_ranks_normalise_like_one_process_with_the_full_batch(ranks: list[dict[str, Tensor]]) -> None:
    norm = nn.BatchNorm2d(3)
    norm.load_state_dict(filled().state_dict())
    x = random_images()
    norm(x * 2 + 1)
    x = x.clone().requires_grad_()
    y = norm(x)
    (y * normal_input("loss", (4, 3, 5, 6))).pow(3).mean().backward()
    assert x.grad is not None
    assert norm.weight.grad is not None
    norm.eval()
    torch.testing.assert_close(torch.cat([rank["y"] for rank in ranks]), y.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat([rank["x"] for rank in ranks]) / 2, x.grad, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(
        (ranks[0]["gradient"] + ranks[1]["gradient"]) / 2, norm.weight.grad, atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(torch.cat([rank["eval"] for rank in ranks]), norm(x).detach(), atol=1e-4, rtol=1e-4)
    for name, value in norm.state_dict().items():
        for rank in ranks:
            torch.testing.assert_close(rank[name], value, atol=1e-4, rtol=1e-5)


def test_ranks_agree_in_16_bits(ranks: list[dict[str, Tensor]]) -> None:
    one, two = (rank["sixteen bits"] for rank in ranks)
    assert torch.equal(one, two)
    expected = nn.BatchNorm2d(3)
    expected(random_images())
    assert expected.running_mean is not None
    torch.testing.assert_close(one.float(), expected.running_mean, atol=0.03, rtol=0.01)


def test_one_process_uses_plain_batch_norm() -> None:
    norm, reference = filled(), nn.BatchNorm2d(3)
    reference.load_state_dict(norm.state_dict())
    torch.testing.assert_close(norm(random_images()), reference(random_images()), atol=0, rtol=0)
    assert list(norm.state_dict()) == list(reference.state_dict())
