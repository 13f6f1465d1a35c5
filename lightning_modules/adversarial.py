"""The game between tokenizer and discriminator. B batch, H × W pixels."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.vqgan_config import VQGANLossConfig
from llamagen.distributed.across_ranks import mean_over_ranks
from llamagen.losses import ADVERSARIAL_LOSSES, adaptive_weight
from llamagen.losses.lecam import LeCAM
from llamagen.models.augmentation import DiscriminatorAugmentation
from llamagen.models.discriminator import Discriminator

Terms = dict[str, Tensor]
"""Unweighted terms of a loss by name, scalars; also what is only logged."""


class AdversarialGame(nn.Module):
    """Losses of both sides, with what is done to images before the discriminator sees them.

    Args:
        config: which losses, and their weights.
        augmentation: any of ``color``, ``translation`` and ``cutout``.
    """

    def __init__(self, config: VQGANLossConfig, augmentation: Sequence[str] = ()) -> None:
        super().__init__()
        self.config, self.losses = config, ADVERSARIAL_LOSSES[config.adversarial]
        self.augmentation = DiscriminatorAugmentation(augmentation)
        self.lecam = LeCAM() if config.lecam_weight > 0 else None

    def generator_loss(self, discriminator: Discriminator, reconstruction: Tensor) -> Tensor:
        """Unweighted loss of reconstructions (B, 3, H, W), a scalar without gradient to the discriminator."""
        with frozen(discriminator):
            judged = discriminator(self.augmentation(reconstruction))
        return self.losses.generator(judged.float())

    def generator_weight(self, terms: Terms, last_weight: Tensor, scaler: Any) -> Tensor | float:
        """Weight of the generator's adversarial term; an adaptive one is added to the terms, to be logged.

        Args:
            terms: of the generator's loss.
            last_weight: of the decoder's last layer.
            scaler: the GradScaler of a run in float16, or None.
        """
        config = self.config
        if not config.adaptive_weight:
            return config.adversarial_weight
        pixels = config.reconstruction_weight * terms["reconstruction"]
        if "perceptual" in terms:
            pixels = pixels + config.perceptual_weight * terms["perceptual"]
        scale = 1.0 if scaler is None else scaler.get_scale()
        weight = adaptive_weight(pixels, terms["generator"], last_weight, mean_over_ranks, scale)
        # In float16 it is not a number where the scale is too large: the whole gradient then is none, so the scaler
        # skips the step and halves the scale. Only the log gets a number.
        terms["adaptive_weight"] = weight if scaler is None else weight.nan_to_num(0.0)
        return config.adversarial_weight * weight

    def discriminator_loss(
        self, discriminator: Discriminator, images: Tensor, reconstruction: Tensor
    ) -> tuple[Tensor, Terms]:
        """Loss of telling images (B, 3, H, W) from detached reconstructions, a scalar, and its unweighted terms."""
        real = discriminator(self.augmentation(images)).float()
        fake = discriminator(self.augmentation(reconstruction)).float()
        loss = self.losses.discriminator(real, fake)
        terms = {"discriminator": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        if self.lecam is None:
            return loss, terms
        self.lecam.update(*mean_over_ranks(torch.stack([terms["logits_real"], terms["logits_fake"]]).detach()))
        terms["lecam"] = self.lecam(real, fake)
        return loss + self.config.lecam_weight * terms["lecam"], terms


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Gradients pass through the network but not into its parameters."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)
