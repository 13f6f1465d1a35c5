"""Adversarial losses of tokenizer and discriminator. B batch, H × W pixels."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.vqgan_config import VQGANLossConfig
from llamagen.checkpoints.weights import strip_prefix
from llamagen.distributed.across_ranks import mean_over_ranks
from llamagen.losses import ADVERSARIAL_LOSSES, adaptive_weight
from llamagen.losses.lecam import LeCAM
from llamagen.models.augmentation import DiscriminatorAugmentation
from llamagen.models.discriminator import Discriminator
from llamagen.state_dicts import differences

Terms = dict[str, Tensor]
"""Unweighted loss terms by name, and values that are only logged: scalars."""


class AdversarialGame(nn.Module):
    """Computes the losses of both networks, including augmentation, adaptive weight and LeCAM.

    Args:
        config: loss functions and weights.
        augmentation: augmentations before the discriminator: any of ``color``, ``translation`` and ``cutout``.
    """

    def __init__(self, config: VQGANLossConfig, augmentation: Sequence[str] = ()) -> None:
        super().__init__()
        self.config, self.losses = config, ADVERSARIAL_LOSSES[config.adversarial]
        self.augmentation = DiscriminatorAugmentation(augmentation)
        self.lecam = LeCAM() if config.lecam_weight > 0 else None

    def generator_loss(self, discriminator: Discriminator, reconstruction: Tensor) -> Tensor:
        """Unweighted loss of reconstructions (B, 3, H, W), a scalar; the discriminator gets no gradient."""
        with frozen(discriminator):
            logits = discriminator(self.augmentation(reconstruction))
        return self.losses.generator(logits.float())

    def generator_weight(self, terms: Terms, last_weight: Tensor, scaler: Any) -> Tensor | float:
        """Weight of the generator's adversarial loss; an adaptive weight is also added to ``terms`` for the log.

        Args:
            terms: terms of the generator's loss.
            last_weight: weight of the decoder's last layer.
            scaler: GradScaler of a float16 run, or None.
        """
        config = self.config
        if not config.adaptive_weight:
            return config.adversarial_weight
        pixels = config.reconstruction_weight * terms["reconstruction"]
        if "perceptual" in terms:
            pixels = pixels + config.perceptual_weight * terms["perceptual"]
        scale = 1.0 if scaler is None else scaler.get_scale()
        weight = adaptive_weight(pixels, terms["generator"], last_weight, mean_over_ranks, scale)
        # footgun: in float16 the weight is NaN if the loss scale is too large. Then all gradients are NaN, and the
        # scaler skips the step and halves the scale. Only the log gets 0.
        terms["adaptive_weight"] = weight if scaler is None else weight.nan_to_num(0.0)
        return config.adversarial_weight * weight

    def discriminator_loss(
        self, discriminator: Discriminator, images: Tensor, reconstruction: Tensor
    ) -> tuple[Tensor, Terms]:
        """Loss on images and detached reconstructions (B, 3, H, W), a scalar, and its unweighted terms."""
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
    """Context in which gradients flow through the network but not into its parameters."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)


def select_adversarial_state(state: dict[str, Tensor], own: Mapping[str, Tensor], training: bool) -> None:
    """Make the state dict of a checkpoint fit a module, where its adversarial loss may differ.

    LeCAM's state may be missing or superfluous, and without training so may the discriminator.

    Args:
        state: entries of the checkpoint, changed in place.
        own: entries of the module.
        training: whether the run is trained further.

    Raises:
        ValueError: in one line, if the run is trained further and the checkpoint has another discriminator.
    """
    if training and (
        differing := differences(strip_prefix("discriminator.", state), strip_prefix("discriminator.", own))
    ):
        raise ValueError(
            f"the checkpoint has another discriminator: {differing}; use model.init_args.discriminator and "
            "loss.adversarial_weight of its run, or start a new run with model.init_args.init_from"
        )
    optional = ("game.",) if training else ("game.", "discriminator.")
    saved = {name: state.pop(name) for name in list(state) if name.startswith(optional)}
    state |= {
        name: saved[name] if training and name in saved else value
        for name, value in own.items()
        if name.startswith(optional)
    }
