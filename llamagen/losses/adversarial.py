"""Adversarial losses of the tokenizer, on discriminator logits of any shape (positive means real)."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Mean of ``relu(1 − real)`` and ``relu(1 + fake)``, halved (arXiv 1705.02894)."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """``−mean(fake)``: the generator wants its images judged real."""
    return -fake.mean()


def logistic_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Cross entropy of telling real from fake, halved: ``softplus(−real)`` and ``softplus(fake)`` (arXiv 1406.2661)."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def non_saturating_generator_loss(fake: Tensor) -> Tensor:
    """``mean(softplus(−fake))``: the cross entropy of taking fakes for real (arXiv 1406.2661, section 3)."""
    return F.softplus(-fake).mean()


class AdversarialLoss(NamedTuple):
    """A game.

    Attributes:
        discriminator: loss of (logits of real images, logits of fakes).
        generator: loss of (logits of fakes).
    """

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


# "vanilla" is what VQGAN's code means by it (arXiv 2012.09841): a logistic discriminator and the linear term of hinge.
ADVERSARIAL_LOSSES = {
    "hinge": AdversarialLoss(hinge_discriminator_loss, hinge_generator_loss),
    "vanilla": AdversarialLoss(logistic_discriminator_loss, hinge_generator_loss),
    "non_saturating": AdversarialLoss(logistic_discriminator_loss, non_saturating_generator_loss),
}
