"""The tokenizer's loss in numbers."""

from dataclasses import dataclass, fields
from typing import Literal

from llamagen.losses import ADVERSARIAL_LOSSES
from llamagen.option_checks import check_integer, check_not_negative

RECONSTRUCTIONS = ("l2", "l1")


@dataclass(frozen=True)
class VQGANLossConfig:
    """Terms of the tokenizer's loss and their weights (arXiv 2406.06525, section 2.1).

    Args:
        reconstruction: error of the pixels: ``l2``, the mean square, or ``l1``, the mean absolute value.
        reconstruction_weight: of the error of the pixels.
        perceptual_weight: of LPIPS; at 0 it is not computed and its weights are not needed.
        codebook_weight: of the term that pulls codebook entries to the latents.
        commitment_weight: of the term that pulls latents to the codebook entries.
        entropy_weight: of the term that rewards use of the whole codebook; not computed at 0.
        adversarial: ``hinge``; ``vanilla``, a logistic discriminator with the generator's term of hinge; or
            ``non_saturating``, the logistic losses of both sides.
        adversarial_weight: of the generator's adversarial loss; at 0 there is no discriminator.
        adversarial_start: optimizer step at which the adversarial loss and the discriminator's training begin.
        adaptive_weight: multiply ``adversarial_weight`` by the ratio of the gradients that the reconstruction and the
            discriminator send into the decoder's last layer. Costs another backward pass through LPIPS and the
            discriminator.
        lecam_weight: of LeCAM, which keeps a discriminator that sees few images from overfitting; none at 0.
    """

    reconstruction: Literal["l2", "l1"] = "l2"
    reconstruction_weight: float = 1.0
    perceptual_weight: float = 1.0
    codebook_weight: float = 1.0
    commitment_weight: float = 0.25
    entropy_weight: float = 0.0
    adversarial: Literal["hinge", "vanilla", "non_saturating"] = "hinge"
    adversarial_weight: float = 0.5
    adversarial_start: int = 20_000
    adaptive_weight: bool = False
    lecam_weight: float = 0.0

    def __post_init__(self) -> None:
        """Refuse negative weights and unknown losses."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float):
                check_not_negative(field.name, value)
        check_integer("adversarial_start", self.adversarial_start, 0)
        if self.reconstruction not in RECONSTRUCTIONS:
            raise ValueError(f"reconstruction is {self.reconstruction!r}; choose one of {', '.join(RECONSTRUCTIONS)}")
        if self.adversarial not in ADVERSARIAL_LOSSES:
            raise ValueError(f"adversarial is {self.adversarial!r}; choose one of {', '.join(ADVERSARIAL_LOSSES)}")
