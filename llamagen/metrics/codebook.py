"""Usage of the codebook."""

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric


class CodebookStatistics(NamedTuple):
    """How often the K codes occurred.

    Attributes:
        usage: fraction of the codes that occurred, in [0, 1].
        perplexity: effective number of codes, exp of the entropy of their frequencies, in [1, K].
        counts: (K,) int64, how often each code occurred.
    """

    usage: Tensor
    perplexity: Tensor
    counts: Tensor


class CodebookUsage(Metric):
    """Counts codes over all ranks; K codes.

    Args:
        codebook_size: number of codes K.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, codebook_size: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(codebook_size, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, codes: Tensor) -> None:
        """Count codes.

        Args:
            codes: integers in [0, K) of any shape and integer dtype.

        Raises:
            ValueError: if the codes are not integers, or a code is K or more.
        """
        if codes.is_floating_point() or codes.is_complex() or codes.dtype is torch.bool:
            raise ValueError(f"codes must be integers, not {codes.dtype}")
        counts = torch.bincount(codes.flatten().long(), minlength=len(self.counts))
        if len(counts) > len(self.counts):
            raise ValueError(f"a code is {len(counts) - 1}, but the codebook has {len(self.counts)} entries")
        self.counts += counts

    def compute(self) -> CodebookStatistics:
        """Usage and perplexity; 0 and 1 if nothing was counted."""
        frequency = self.counts.double() / self.counts.sum().clamp(min=1)
        return CodebookStatistics(
            (self.counts > 0).float().mean(),
            torch.exp(-torch.xlogy(frequency, frequency).sum()).float(),
            self.counts.clone(),
        )
