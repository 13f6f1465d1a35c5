"""How much of the codebook is in use."""

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric


class CodebookStatistics(NamedTuple):
    """What became of the codes; K codes.

    Attributes:
        usage: share of the codes that occurred, in [0, 1].
        perplexity: effective number of codes, exp of the entropy of their frequencies, in [1, K].
        counts: (K,) int64, how often each occurred.
    """

    usage: Tensor
    perplexity: Tensor
    counts: Tensor


class CodebookUsage(Metric):
    """Counts every code that it is shown, over all ranks; K codes.

    Args:
        codebook_size: number of codes K.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, codebook_size: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(codebook_size, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, codes: Tensor) -> None:
        """Count codes of any shape, int64 in [0, K)."""
        self.counts += torch.bincount(codes.flatten(), minlength=len(self.counts))

    def compute(self) -> CodebookStatistics:
        """Usage 0 and perplexity 1 if nothing was counted."""
        frequency = self.counts.double() / self.counts.sum().clamp(min=1)
        return CodebookStatistics(
            (self.counts > 0).float().mean(),
            torch.exp(-torch.xlogy(frequency, frequency).sum()).float(),
            self.counts.clone(),
        )
