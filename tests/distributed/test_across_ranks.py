"""Losses that depend on the batch as a whole use the global batch on any number of ranks."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from llamagen.distributed.across_ranks import mean_over_ranks, sum_over_ranks
from llamagen.losses import adaptive_weight, entropy_loss
from tests.golden import normal_input
from tests.ranks import run_on_ranks


def entropy_of(rows: slice) -> dict[str, Tensor]:
    latent = F.normalize(normal_input("latent", (4, 3, 2, 2)), dim=1)[rows].requires_grad_()
    codebook = F.normalize(normal_input("codebook", (9, 3)), dim=1).requires_grad_()
    loss = entropy_loss(latent, codebook, mean_over_ranks)
    loss.backward()
    assert latent.grad is not None
    assert codebook.grad is not None
    return {"loss": loss.detach(), "latent": latent.grad, "codebook": codebook.grad}


def weight_of(rows: slice) -> Tensor:
    weight = normal_input("weight", (5,)).requires_grad_()
    outputs = normal_input("rows", (4, 5))[rows] @ weight
    return adaptive_weight(outputs.square().mean(), outputs.sin().mean(), weight, mean_over_ranks)


def one_rank(rank: int) -> dict[str, Tensor]:
    rows = slice(2 * rank, 2 * rank + 2)
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    (sum_over_ranks(x) * (rank + 1)).sum().backward()
    assert x.grad is not None
    return {**entropy_of(rows), "weight": weight_of(rows), "gradient": x.grad}


def test_two_ranks_match_one_process(tmp_path: Path) -> None:
    ranks = run_on_ranks(one_rank, tmp_path)
    full = entropy_of(slice(None))
    torch.testing.assert_close((ranks[0]["loss"] + ranks[1]["loss"]) / 2, full["loss"])
    torch.testing.assert_close(torch.cat([rank["latent"] for rank in ranks]) / 2, full["latent"])
    torch.testing.assert_close((ranks[0]["codebook"] + ranks[1]["codebook"]) / 2, full["codebook"])
    for rank in ranks:
        torch.testing.assert_close(rank["weight"], weight_of(slice(None)))
        # The losses of the two ranks multiply the sum by 1 and 2.
        assert rank["gradient"].tolist() == [3.0, 3.0]
