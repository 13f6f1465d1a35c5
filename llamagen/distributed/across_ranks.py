"""Differentiable sums and means over the ranks of a distributed run."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # The losses of all ranks depend on each rank's input, so their gradients are summed.
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum a tensor of any shape over all ranks, which must all call it. Gradients are those of the summed losses."""
    if world_size() == 1:
        return x
    total: Tensor = _Sum.apply(x)
    return total


def mean_over_ranks(x: Tensor) -> Tensor:
    """Average a tensor of any shape over all ranks, which must all call it; differentiable."""
    return sum_over_ranks(x) / world_size()
