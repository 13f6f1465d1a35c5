"""Configuration of the tokenizer's loss."""

from dataclasses import dataclass, fields
from typing import Literal

from llamagen.losses import ADVERSARIAL_LOSSES
from llamagen.option_checks import check_integer, check_not_negative

RECONSTRUCTIONS = ("l2", "l1")


@dataclass(frozen=True)
class VQGANLossConfig:
    """Terms of the tokenizer's loss and their weights (arXiv 2406.06525, section 2.1).

    Args:
        reconstruction: pixel loss: ``l2``, the mean squared error, or ``l1``, the mean absolute error.
        reconstruction_weight: weight of the pixel loss.
        perceptual_weight: weight of LPIPS; at 0 it is not computed and its network is not downloaded.
        codebook_weight: weight of the codebook loss, which pulls codebook entries to the latents.
        commitment_weight: weight of the commitment loss, which pulls latents to the codebook entries.
        entropy_weight: weight of the entropy loss, which encourages the use of all codes; at 0 it is not computed.
        adversarial: ``hinge``; ``vanilla``, the logistic loss for the discriminator and hinge for the generator; or
            ``non_saturating``, the logistic loss for both.
        adversarial_weight: weight of the generator's adversarial loss; at 0 there is no discriminator.
        adversarial_start: optimizer step at which the adversarial loss and the training of the discriminator start.
        adaptive_weight: multiply ``adversarial_weight`` by the ratio of the gradient norms of reconstruction and
            adversarial loss at the decoder's last layer. Costs another backward pass through LPIPS and the
            discriminator.
        lecam_weight: weight of LeCAM, which reduces overfitting of the discriminator on small datasets; 0 for none.
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
        """Check all values.

        Raises:
            ValueError: in one line, for a negative weight or an unknown loss.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float):
                check_not_negative(field.name, value)
        check_integer("adversarial_start", self.adversarial_start, 0)
        if self.reconstruction not in RECONSTRUCTIONS:
            raise ValueError(f"reconstruction is {self.reconstruction!r}; choose one of {', '.join(RECONSTRUCTIONS)}")
        if self.adversarial not in ADVERSARIAL_LOSSES:
            raise ValueError(f"adversarial is {self.adversarial!r}; choose one of {', '.join(ADVERSARIAL_LOSSES)}")
