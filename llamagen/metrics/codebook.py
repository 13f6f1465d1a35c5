"""How much of the codebook is in use."""

import torch
from torch import Tensor
from torchmetrics import Metric


class CodebookUsage(Metric):
    """Counts every code that it is shown, over all ranks; K codes.

    ``compute`` gives the share of codes that occurred and the perplexity, the effective number of codes: exp of the
    entropy of their frequencies.

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

    def compute(self) -> dict[str, Tensor]:
        """``usage`` in [0, 1] and ``perplexity`` in [1, K], float32 scalars; 0 and 1 if nothing was counted."""
        frequency = self.counts.double() / self.counts.sum().clamp(min=1)
        return {
            "usage": (self.counts > 0).float().mean(),
            "perplexity": torch.exp(-torch.xlogy(frequency, frequency).sum()).float(),
        }
