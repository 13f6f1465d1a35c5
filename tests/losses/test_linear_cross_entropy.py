"""The blockwise cross entropy matches PyTorch's on all logits."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llamagen.losses.linear_cross_entropy import CrossEntropy, linear_cross_entropy, linear_token_nll

ROWS, WIDTH, VOCABULARY = 23, 12, 40


def inputs(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(VOCABULARY, (ROWS,), generator=generator)


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, label_smoothing: float, z_loss: float) -> CrossEntropy:
    logits = F.linear(hidden, weight)
    loss = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    penalty = z_loss * logits.logsumexp(-1).square().mean()
    return CrossEntropy(loss + penalty, F.cross_entropy(logits, targets).detach())


@pytest.mark.parametrize("max_logits", [1, VOCABULARY, 7 * VOCABULARY, 10**6])
@pytest.mark.parametrize(("label_smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.3), (0.2, 0.1)])
def test_loss_and_gradients_match_pytorch(label_smoothing: float, z_loss: float, max_logits: int) -> None:
    ours, theirs = inputs(torch.float32), inputs()
    found = linear_cross_entropy(*ours, label_smoothing, z_loss, max_logits)
    expected = plain(*theirs, label_smoothing, z_loss)
    torch.testing.assert_close(found.loss.double(), expected.loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.nats.double(), expected.nats, atol=1e-5, rtol=1e-5)
    (3.0 * found.loss).backward()
    (3.0 * expected.loss).backward()
    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(mine.grad.double(), other.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_matrix_products_use_the_dtype_of_autocast(dtype: torch.dtype) -> None:
    hidden, weight, targets = inputs(torch.float32)
    with torch.autocast("cpu", dtype):
        found = linear_cross_entropy(hidden, weight, targets)
    assert found.loss.dtype == torch.float32
    (found.loss * 2.0**12).backward()
    rounded = [part.detach().to(dtype).double().requires_grad_() for part in (hidden, weight)]
    expected = plain(*rounded, targets, 0.0, 0.0)
    (expected.loss * 2.0**12).backward()
    torch.testing.assert_close(found.loss.double(), expected.loss, atol=0.02, rtol=0.02)
    for mine, other in zip((hidden, weight), rounded, strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        assert mine.grad.dtype == torch.float32
        assert (mine.grad.double() - other.grad).norm() < 0.02 * other.grad.norm()


def test_gradients_of_many_rows_do_not_underflow_in_half_precision() -> None:
    hidden = torch.zeros(70_000, 2, requires_grad=True)
    weight = torch.tensor([[0.0, 0.0], [0.0, 1.0]], requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        loss = linear_cross_entropy(hidden, weight, torch.zeros(70_000, dtype=torch.long)).loss
    (65536.0 * loss).backward()
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad[:, 1], torch.full((70_000,), 0.5 * 65536 / 70_000), rtol=1e-3, atol=0)


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_inputs_get_no_gradient(frozen: int) -> None:
    parts = inputs(torch.float32)
    parts[frozen].requires_grad_(False)
    linear_cross_entropy(*parts).loss.backward()
    assert parts[frozen].grad is None
    assert parts[1 - frozen].grad is not None


def test_without_gradients_nothing_is_saved_for_the_backward_pass() -> None:
    with torch.no_grad():
        found = linear_cross_entropy(*inputs(torch.float32))
    assert not found.loss.requires_grad
    torch.testing.assert_close(found.loss, found.nats)


class _Largest(torch.overrides.TorchFunctionMode):
    """Records the size of the largest result of any operator."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_no_tensor_is_as_large_as_all_logits() -> None:
    hidden, weight = torch.randn(512, 8, requires_grad=True), torch.randn(256, 8, requires_grad=True)
    targets = torch.zeros(512, dtype=torch.long)
    with _Largest() as largest:
        linear_cross_entropy(hidden, weight, targets, max_logits=16 * 256).loss.backward()
    assert largest.numel == 512 * 8  # the gradient of the rows
    with _Largest() as largest:
        F.cross_entropy(F.linear(hidden, weight), targets)
    assert largest.numel == 512 * 256


@pytest.mark.parametrize("max_logits", [1, 7 * VOCABULARY, 10**6])
def test_token_nll_is_the_cross_entropy_and_rank_of_each_target(max_logits: int) -> None:
    hidden, weight, targets = inputs(torch.float32)
    found = linear_token_nll(hidden, weight, targets, max_logits)
    logits = F.linear(hidden, weight)
    torch.testing.assert_close(found.nats, F.cross_entropy(logits, targets, reduction="none"), atol=1e-5, rtol=1e-5)
    order = logits.argsort(-1, descending=True)
    assert torch.equal(found.rank, (order == targets[:, None]).int().argmax(-1))
    assert not found.nats.requires_grad


def test_many_rows_with_the_same_target_do_not_overflow_float16() -> None:
    torch.manual_seed(0)
    hidden = (5.0 + torch.randn(16384, 8)).half()
    weight = torch.zeros(1024, 8, requires_grad=True)
    targets = torch.zeros(16384, dtype=torch.int64)
    with torch.autocast("cpu", torch.float16):
        linear_cross_entropy(hidden, weight, targets).loss.backward()
    assert weight.grad is not None
    expected = -hidden.float().mean(0) * (1 - 1 / 1024)
    torch.testing.assert_close(weight.grad[0], expected, rtol=5e-3, atol=0)
