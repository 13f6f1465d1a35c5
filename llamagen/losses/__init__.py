"""Loss terms as pure functions."""

from llamagen.losses.adaptive_weight import adaptive_weight
from llamagen.losses.adversarial import (
    ADVERSARIAL_LOSSES,
    AdversarialLoss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    logistic_discriminator_loss,
    non_saturating_generator_loss,
)
from llamagen.losses.head_terms import HeadTerm, heads_cross_entropy, heads_token_nll
from llamagen.losses.lecam import LeCAM
from llamagen.losses.linear_cross_entropy import CrossEntropy, TokenNLL, linear_cross_entropy, linear_token_nll
from llamagen.losses.quantization import (
    codebook_loss,
    commitment_loss,
    entropy_loss,
    factorized_entropy_loss,
    negative_entropy,
)

__all__ = [
    "ADVERSARIAL_LOSSES",
    "AdversarialLoss",
    "CrossEntropy",
    "HeadTerm",
    "LeCAM",
    "TokenNLL",
    "adaptive_weight",
    "codebook_loss",
    "commitment_loss",
    "entropy_loss",
    "factorized_entropy_loss",
    "heads_cross_entropy",
    "heads_token_nll",
    "hinge_discriminator_loss",
    "hinge_generator_loss",
    "linear_cross_entropy",
    "linear_token_nll",
    "logistic_discriminator_loss",
    "negative_entropy",
    "non_saturating_generator_loss",
]
