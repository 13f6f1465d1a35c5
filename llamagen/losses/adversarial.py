"""Adversarial losses of the tokenizer, on discriminator logits of any shape (positive means real)."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Mean of ``relu(1 − real)`` and ``relu(1 + fake)``, halved (arXiv 1705.02894)."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """``−mean(fake)`` (arXiv 1705.02894)."""
    return -fake.mean()


def logistic_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Binary cross entropy, halved: means of ``softplus(−real)`` and ``softplus(fake)`` (arXiv 1406.2661)."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def non_saturating_generator_loss(fake: Tensor) -> Tensor:
    """``mean(softplus(−fake))``: cross entropy with the labels of real images (arXiv 1406.2661, section 3)."""
    return F.softplus(-fake).mean()


class AdversarialLoss(NamedTuple):
    """The losses of both networks.

    Attributes:
        discriminator: takes logits of real and of fake images.
        generator: takes logits of fake images.
    """

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


# "vanilla" as in the code of VQGAN (arXiv 2012.09841): logistic for the discriminator, but hinge for the generator.
ADVERSARIAL_LOSSES = {
    "hinge": AdversarialLoss(hinge_discriminator_loss, hinge_generator_loss),
    "vanilla": AdversarialLoss(logistic_discriminator_loss, hinge_generator_loss),
    "non_saturating": AdversarialLoss(logistic_discriminator_loss, non_saturating_generator_loss),
}
