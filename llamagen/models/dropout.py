"""Dropout with fast masks on CPUs, where PyTorch generates one random number at a time."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEVELS = 1 << 16
"""Each mask entry is decided by 16 random bits."""


class Dropout(nn.Module):
    """In training, set random entries to zero and rescale the others to keep the mean.

    On CPUs the probability is rounded to a multiple of 1 / 65,536. A mask takes one byte per entry, as on GPUs.

    Args:
        probability: probability of dropping an entry, in [0, 1).
        place: must differ between dropouts of one compiled graph that may get the same input. footgun: the compiler
            merges equal calls, so with equal ``place`` both dropouts would share one mask.
    """

    def __init__(self, probability: float, place: int = 0) -> None:
        super().__init__()
        self.probability, self.place = probability, place
        self.threshold = min(round(probability * LEVELS), LEVELS - 1)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape and floating-point dtype → the same."""
        if not self.training or self.probability == 0.0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.probability)
        kept: Tensor = _kept(x, self.threshold, self.place)
        return x * kept * (LEVELS / (LEVELS - self.threshold))

    def extra_repr(self) -> str:
        """The probability."""
        return f"probability={self.probability}"


@torch.library.custom_op(
    "llamagen::kept_entries", mutates_args=(), device_types="cpu", tags=(torch.Tag.nondeterministic_seeded,)
)
def _kept(like: Tensor, threshold: int, place: int) -> Tensor:
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None)
    return (words.view(torch.int16)[: like.numel()] >= threshold - LEVELS // 2).view(like.shape)


@_kept.register_fake
def _(like: Tensor, threshold: int, place: int) -> Tensor:
    return torch.empty(like.shape, dtype=torch.bool, device=like.device)
