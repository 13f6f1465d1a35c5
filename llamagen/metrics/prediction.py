"""Quality of next-code prediction."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric


class PredictionStatistics(NamedTuple):
    """Means over all codes; L positions.

    Attributes:
        nats: cross entropy of a code, in nats.
        perplexity: exp of the cross entropy.
        top1: fraction of codes to which the model assigned the highest probability, in [0, 1].
        top5: fraction of codes among the five most probable ones, in [0, 1].
        nats_by_position: (L,) cross entropy at each position of the sequence.
    """

    nats: Tensor
    perplexity: Tensor
    top1: Tensor
    top5: Tensor
    nats_by_position: Tensor


class CodePrediction(Metric):
    """Averages over all codes and ranks; B batch, L positions.

    Args:
        length: L, number of codes of an image.
    """

    full_state_update = False
    nats: Tensor
    hits: Tensor
    count: Tensor

    def __init__(self, length: int) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros(length, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("hits", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nats: Tensor, rank: Tensor) -> None:
        """Add images.

        Args:
            nats: (B, L) float, cross entropy of each code.
            rank: (B, L) int64, number of codes to which the model assigned a higher probability.
        """
        self.nats += nats.double().sum(0)
        self.hits += torch.stack([(rank < 1).sum(), (rank < 5).sum()])
        self.count += len(nats)

    def compute(self) -> PredictionStatistics:
        """The means; NaN if nothing was added."""
        by_position = self.nats / self.count
        nats = by_position.mean()
        top1, top5 = self.hits / (self.count * len(self.nats))
        return PredictionStatistics(nats.float(), nats.exp().float(), top1, top5, by_position.float())

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        """Move to another device, but never change the precision."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), exclude_state)
