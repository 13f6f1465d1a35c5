"""Training of the image tokenizer. B batch, H × W pixels, h × w code grid."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.image import PeakSignalNoiseRatio

from lightning_modules.base import GenerativeModule
from lightning_modules.optimization import AdamWConfig, build_adamw
from llamagen.losses import (
    codebook_loss,
    commitment_loss,
    entropy_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
)
from llamagen.metrics import CodebookUsage
from llamagen.models.discriminator import PatchGAN
from llamagen.models.vqgan import VQGAN, VQGANConfig, VQGANOutput


@dataclass(frozen=True)
class VQGANLossConfig:
    """Weights of the tokenizer's loss (arXiv 2406.06525, section 2.1).

    Args:
        reconstruction_weight: of the mean squared error of the pixels.
        codebook_weight: of the term that pulls codebook entries to the latents.
        commitment_weight: of the term that pulls latents to the codebook entries.
        entropy_weight: of the term that rewards use of the whole codebook; not computed at 0.
        adversarial_weight: of the generator's adversarial loss; at 0 there is no discriminator.
        adversarial_start: optimizer step at which the adversarial loss and the discriminator's training begin.
    """

    reconstruction_weight: float = 1.0
    codebook_weight: float = 1.0
    commitment_weight: float = 0.25
    entropy_weight: float = 0.0
    adversarial_weight: float = 0.5
    adversarial_start: int = 20_000

    def __post_init__(self) -> None:
        """Refuse negative weights."""
        for name, value in vars(self).items():
            if value < 0:
                raise ValueError(f"{name} is {value}; it must be at least 0")


@dataclass(frozen=True)
class PatchGANConfig:
    """Shape of the discriminator.

    Args:
        channels: width of its first convolution.
        num_layers: convolutions of stride 2; fewer for small pictures.
    """

    channels: int = 64
    num_layers: int = 3


class VQGANModule(GenerativeModule):
    """Tokenizer and discriminator, trained by one optimizer in one pass.

    Each step reconstructs, takes the generator's loss with the discriminator frozen, takes the discriminator's loss on
    the detached reconstruction, and returns their sum: neither network sees the other's gradient, and the result is
    that of two optimizers.

    Args:
        net: shape of the tokenizer.
        loss: weights of its loss.
        discriminator: shape of the PatchGAN.
        optimizer: settings of AdamW, for both networks.
    """

    def __init__(
        self,
        net: VQGANConfig | None = None,
        loss: VQGANLossConfig | None = None,
        discriminator: PatchGANConfig | None = None,
        optimizer: AdamWConfig | None = None,
    ) -> None:
        super().__init__()
        self.loss_config = loss or VQGANLossConfig()
        self.optimizer_config = optimizer or AdamWConfig(weight_decay=0.0)
        self.vqgan = VQGAN(net)
        shape = discriminator or PatchGANConfig()
        adversarial = self.loss_config.adversarial_weight > 0
        self.discriminator = PatchGAN(shape.channels, shape.num_layers) if adversarial else None
        self.psnr = PeakSignalNoiseRatio(data_range=1.0)
        self.codebook_usage = CodebookUsage(self.vqgan.config.codebook_size)

    @property
    def generator(self) -> VQGAN:
        """The tokenizer."""
        return self.vqgan

    def setup(self, stage: str) -> None:
        """Refuse pictures that do not fit the networks, now and not when the discriminator starts.

        Raises:
            ValueError: if the size is not a multiple of the downsampling factor, or too small for the discriminator.
        """
        size = getattr(getattr(self.trainer, "datamodule", None), "image_size", None)
        if size is None:
            return
        if size % self.vqgan.config.downsampling:
            raise ValueError(
                f"image_size is {size}; the tokenizer needs a multiple of {self.vqgan.config.downsampling}"
            )
        if self.discriminator is not None and size < self.discriminator.min_size:
            raise ValueError(
                f"image_size is {size}, but the discriminator needs at least {self.discriminator.min_size}; lower "
                "model.init_args.discriminator.num_layers"
            )

    def forward(self, images: Tensor) -> VQGANOutput:
        """Reconstruct pictures (B, 3, H, W) in [-1, 1]."""
        output: VQGANOutput = self.vqgan(images)
        return output

    def reconstruct(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] after encoding and decoding, same shape, not clamped."""
        output: VQGANOutput = self(images)
        return output.reconstruction

    @property
    def _adversarial(self) -> bool:
        return self.discriminator is not None and self.global_step >= self.loss_config.adversarial_start

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of ``batch["images"]`` (B, 3, H, W) in [-1, 1]: the generator's plus the discriminator's."""
        images = batch["images"]
        output = self(images)
        loss, terms = self._generator_terms(images, output)
        discriminator_loss: Tensor | float = 0.0
        if self.discriminator is not None and self._adversarial:
            with frozen(self.discriminator):
                terms["generator"] = hinge_generator_loss(self.discriminator(output.reconstruction))
            loss = loss + self.loss_config.adversarial_weight * terms["generator"]
            real, fake = self.discriminator(images), self.discriminator(output.reconstruction.detach())
            terms["logits_real"], terms["logits_fake"] = real.mean(), fake.mean()
            terms["discriminator"] = discriminator_loss = hinge_discriminator_loss(real, fake)
        elif self.discriminator is not None:
            # DDP waits for every parameter: before the start they take part with a gradient of zero.
            discriminator_loss = 0.0 * sum(parameter.sum() for parameter in self.discriminator.parameters())
        self.log_dict({f"train/{name}": value.detach() for name, value in terms.items()}, batch_size=len(images))
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(images))
        return loss + discriminator_loss

    def _generator_terms(self, images: Tensor, output: VQGANOutput) -> tuple[Tensor, dict[str, Tensor]]:
        """The generator's loss without the adversarial part, and its unweighted terms."""
        encoding, weights = output.encoding, self.loss_config
        terms = {
            "reconstruction": F.mse_loss(output.reconstruction.float(), images.float()),
            "codebook": codebook_loss(encoding.entries, encoding.latent),
            "commitment": commitment_loss(encoding.entries, encoding.latent),
        }
        if weights.entropy_weight > 0:
            terms["entropy"] = entropy_loss(encoding.latent, self.vqgan.quantize.codebook())
        loss = sum((getattr(weights, f"{name}_weight") * value for name, value in terms.items()), torch.zeros(()))
        return loss, terms

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave the discriminator alone before its start: no moments, no weight decay."""
        if self.discriminator is not None and not self._adversarial:
            self.discriminator.zero_grad(set_to_none=True)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each network by itself, so that a wild discriminator does not slow the tokenizer."""
        if not gradient_clip_val:
            return
        for network in (self.vqgan, self.discriminator):
            if network is None:
                continue
            if gradient_clip_algorithm == "value":
                nn.utils.clip_grad_value_(network.parameters(), gradient_clip_val)
            else:
                nn.utils.clip_grad_norm_(network.parameters(), gradient_clip_val)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Reconstruction losses, PSNR (of the mean squared error over the set) and codebook usage under ``val/``."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """The same under ``test/``."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: dict[str, Any], stage: str) -> None:
        images = batch["images"]
        output = self(images)
        loss, terms = self._generator_terms(images, output)
        self.psnr.update(((output.reconstruction.float() + 1) / 2).clamp(0, 1), (images.float() + 1) / 2)
        self.codebook_usage.update(output.encoding.codes)
        scalars = {f"{stage}/{name}": value for name, value in terms.items()}
        self.log_dict(scalars, batch_size=len(images), sync_dist=True)
        self.log(f"{stage}/loss", loss, batch_size=len(images), sync_dist=True, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        """Metrics over the whole validation set and all ranks."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Metrics over the whole test set and all ranks."""
        self._log_metrics("test")

    def _log_metrics(self, stage: str) -> None:
        # Computed here, not handed to `log` as metrics: usage has two results.
        usage = self.codebook_usage.compute()
        self.log(f"{stage}/psnr", self.psnr.compute(), prog_bar=True)
        self.log_dict({f"{stage}/codebook_{name}": value for name, value in usage.items()})
        self.psnr.reset()
        self.codebook_usage.reset()

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Codes of ``batch["images"]``: (B, A, h, w) int64, with A = 1 view of each picture."""
        return self.vqgan.encode(batch["images"]).codes.unsqueeze(1)

    def configure_optimizers(self) -> Any:
        """One AdamW for both networks."""
        networks = [self.vqgan] if self.discriminator is None else [self.vqgan, self.discriminator]
        return build_adamw(networks, self.optimizer_config)


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Gradients pass through the network but not into its parameters."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)
