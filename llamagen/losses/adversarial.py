"""Adversarial losses of the tokenizer, on discriminator logits of any shape (positive means real)."""

from torch import Tensor
from torch.nn import functional as F


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Mean of ``relu(1 − real)`` and ``relu(1 + fake)``, halved (arXiv 1705.02894)."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """``−mean(fake)``: the generator wants its pictures judged real."""
    return -fake.mean()
