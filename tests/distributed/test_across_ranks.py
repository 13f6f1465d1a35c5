"""Losses whose value depends on the whole batch see it, on however many ranks it is."""

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


def test_two_ranks_compute_what_one_process_does(tmp_path: Path) -> None:
    ranks = run_on_ranks(one_rank, tmp_path)
    whole = entropy_of(slice(None))
    torch.testing.assert_close((ranks[0]["loss"] + ranks[1]["loss"]) / 2, whole["loss"])
    torch.testing.assert_close(torch.cat([rank["latent"] for rank in ranks]) / 2, whole["latent"])
    torch.testing.assert_close((ranks[0]["codebook"] + ranks[1]["codebook"]) / 2, whole["codebook"])
    for rank in ranks:
        torch.testing.assert_close(rank["weight"], weight_of(slice(None)))
        # Each rank's loss counts the sum with its own factor, 1 and 2.
        assert rank["gradient"].tolist() == [3.0, 3.0]
