"""Loss terms as pure functions."""

from llamagen.losses.adversarial import hinge_discriminator_loss, hinge_generator_loss
from llamagen.losses.quantization import codebook_loss, commitment_loss, entropy_loss

__all__ = [
    "codebook_loss",
    "commitment_loss",
    "entropy_loss",
    "hinge_discriminator_loss",
    "hinge_generator_loss",
]
