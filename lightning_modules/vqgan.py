"""Training of the image tokenizer. B batch, H × W pixels, h × w code grid, K codes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from lightning_modules.adversarial import AdversarialGame, Terms, select_adversarial_state
from lightning_modules.base import GenerativeModule
from lightning_modules.code_revival import CodeRevival
from lightning_modules.freezing import FREEZE, FrozenParts
from lightning_modules.generator_loss import configure_quantizer_losses, generator_loss
from lightning_modules.initial_weights import start_from
from lightning_modules.optimization import AdamWConfig
from lightning_modules.reconstruction_metrics import ReconstructionMetrics
from lightning_modules.vqgan_config import VQGANLossConfig
from llamagen.checkpoints.weights import ENTRY, codes_of_entry
from llamagen.finite import check_finite
from llamagen.metrics import CodebookStatistics, CodebookUsage
from llamagen.models.discriminator import Discriminator, PatchGAN
from llamagen.models.lpips import LPIPS, MIN_SIZE, fetch_vgg16, read_vgg16
from llamagen.models.quantizer import Quantized, Quantizer
from llamagen.models.vqgan import VQGAN, VQGANConfig, VQGANOutput
from llamagen.option_checks import check_integer


class VQGANModule(GenerativeModule):
    """Trains tokenizer and discriminator with one optimizer in one pass.

    Each step computes the generator's loss with the discriminator frozen and the discriminator's loss on the detached
    reconstruction, and returns their sum. Neither network receives the other's gradient, so the result equals that of
    two optimizers. On several ranks it equals that of one process with the global batch.

    Args:
        net: shape of the tokenizer.
        loss: terms of the loss and their weights.
        discriminator: ``PatchGAN`` (the default), ``StyleGAN`` or ``DINODiscriminator``, with its settings.
        optimizer: settings of AdamW, for both networks.
        augmentation: augmentations of real and reconstructed images before the discriminator: any of ``color``,
            ``translation`` and ``cutout``. Useful for small datasets.
        lpips_weights: file of torchvision's VGG16 for LPIPS; None takes it from torch.hub's cache, or downloads it. If
            given, validation measures LPIPS even if ``loss.perceptual_weight`` is 0.
        revive_codes_every: optimizer steps between two revivals of unused codes, which move them to latents of the
            current batch; 0 for none.
        init_from: weights to start from: a published ``.pt``, a checkpoint of this project, or safetensors; a path, a
            published name such as ``vq_ds16_c2i``, or ``hf://owner/repository/file[@revision]``.
        init_averaged: take the averaged (EMA) weights of ``init_from``, if it has them.
        freeze: parts that keep the weights of ``init_from``: ``encoder``, ``quantizer`` or both. With both, the codes
            of all images stay the same, so that codes and autoregressive models of ``init_from`` remain valid.
        channels_last: store images and weights in channels-last memory format, which convolutions on GPUs prefer.
        compile: compile encoder, decoder and LPIPS; takes minutes at the start.
        activation_checkpointing: recompute the blocks of encoder and decoder in the backward pass: less memory, about
            a third more compute.

    Raises:
        ValueError: in one line, if an option is wrong or ``init_from`` does not fit.
    """

    def __init__(
        self,
        net: VQGANConfig | None = None,
        loss: VQGANLossConfig | None = None,
        discriminator: Discriminator | None = None,
        optimizer: AdamWConfig | None = None,
        augmentation: Sequence[Literal["color", "translation", "cutout"]] = (),
        lpips_weights: Path | str | None = None,
        revive_codes_every: int = 0,
        init_from: str | Path | None = None,
        init_averaged: bool = True,
        freeze: Sequence[Literal["encoder", "quantizer"]] = (),
        channels_last: bool = True,
        compile: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(optimizer or AdamWConfig(weight_decay=0.0))
        self.loss_config = loss or VQGANLossConfig()
        self.frozen = FrozenParts(freeze, init_from, revive_codes_every, self.loss_config.entropy_weight)
        net = net or VQGANConfig()
        self.vqgan = VQGAN(net)
        quantizer = self.vqgan.quantize
        configure_quantizer_losses(quantizer, self.loss_config)
        self.vqgan.checkpoint_activations(activation_checkpointing)
        adversarial = self.loss_config.adversarial_weight > 0
        self.discriminator = (discriminator or PatchGAN()) if adversarial else None
        self.game = AdversarialGame(self.loss_config, augmentation) if adversarial else None
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._compile = compile
        if lpips_weights is not None:
            fetch_vgg16(lpips_weights)
        self.lpips_weights = lpips_weights
        # footgun: in a tuple, so that nn.Module does not register it; it must not be in a state dict or an optimizer.
        self._lpips: tuple[LPIPS, ...] = ()
        self.metrics = ReconstructionMetrics(quantizer.size)
        self.train_codebook_usage = CodebookUsage(quantizer.size)
        check_integer("revive_codes_every", revive_codes_every, 0)
        self.revival = CodeRevival(quantizer, revive_codes_every) if revive_codes_every else None
        self._revived: int | None = None
        self._handles: list[Any] = []
        self.code_counts: dict[str, Tensor] = {}
        self._broken_in_validation: Terms = {}
        self._discriminator_mismatch: ValueError | None = None  # raised in setup, and only for fit
        if init_from is not None:
            self._discriminator_mismatch = start_from(init_from, init_averaged, self.vqgan, self.discriminator)
        self.frozen.freeze(self.vqgan)

    @property
    def generator(self) -> VQGAN:
        """The tokenizer."""
        return self.vqgan

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The tokenizer, and the discriminator if there is one."""
        networks: dict[str, nn.Module | None] = {"vqgan": self.vqgan, "discriminator": self.discriminator}
        return {name: network for name, network in networks.items() if network is not None}

    def prepare_data(self) -> None:
        """Download the weights of LPIPS and the discriminator if needed, in one process per machine."""
        if self._needs_lpips:
            fetch_vgg16(self.lpips_weights)
        if self.discriminator is not None and self.trainer.state.fn == "fit":
            if self._image_size is not None:
                self.discriminator.check_size(self._image_size)  # before weights are downloaded for it
            self.discriminator.fetch()

    @property
    def _image_size(self) -> int | None:
        """Side of the data's images in pixels; None without a datamodule that has one."""
        return getattr(getattr(self.trainer, "datamodule", None), "image_size", None)

    @property
    def _needs_lpips(self) -> bool:
        enabled = self.loss_config.perceptual_weight > 0 or self.lpips_weights is not None
        return enabled and self.trainer.state.fn != "predict"

    def setup(self, stage: str) -> None:
        """Check the image size before the first step, and load LPIPS.

        Raises:
            ValueError: if the image size is not a multiple of the downsampling factor or too small for a network, if
                ``init_from`` has another discriminator, or if the precision is not suitable for training.
        """
        super().setup(stage)
        if stage == "fit":
            if self._discriminator_mismatch is not None:
                raise self._discriminator_mismatch
            self.frozen.check_precision(self.trainer.precision)
            if not self.frozen.keeps_codes:
                self.vqgan.codes_of = None
        size = self._image_size
        if size is not None:
            if size % self.vqgan.config.downsampling:
                raise ValueError(
                    f"image_size is {size}; the tokenizer needs a multiple of {self.vqgan.config.downsampling}"
                )
            if self.discriminator is not None and stage == "fit":
                self.discriminator.check_size(size)
            if self._needs_lpips and size < MIN_SIZE:
                raise ValueError(
                    f"image_size is {size}; LPIPS needs at least {MIN_SIZE}, or "
                    "set model.init_args.loss.perceptual_weight to 0"
                )
        if self.discriminator is not None and stage == "fit":
            self.discriminator.load()
        if self._needs_lpips and not self._lpips:
            self._lpips = (LPIPS(read_vgg16(self.lpips_weights)),)
        for network in (self.vqgan, self.discriminator, *self._lpips):
            if network is not None:
                convert_conv2d_weight_memory_format(network, self.memory_format)
        if self._compile:
            if self.loss_config.adaptive_weight:  # a second backward pass through the compiled decoder
                torch._functorch.config.donated_buffer = False
            for part in (self.vqgan.encoder, self.vqgan.decoder, *self._lpips):
                part.compile()  # in place: names in the state dict do not change

    def forward(self, images: Tensor) -> VQGANOutput:
        """Reconstruct images (B, 3, H, W) in [-1, 1]."""
        output: VQGANOutput = self.vqgan(images.to(memory_format=self.memory_format))
        return output

    def reconstruct(self, images: Tensor) -> Tensor:
        """Encode and decode images (B, 3, H, W) in [-1, 1]; same shape, not clamped.

        Raises:
            FloatingPointError: if the reconstruction is not finite.
        """
        output: VQGANOutput = self(images)
        reconstruction = output.reconstruction
        check_finite("the reconstruction is", reconstruction, self.precision_name, self.vqgan, lambda: self(images))
        return reconstruction

    @property
    def _adversarial(self) -> bool:
        return self.discriminator is not None and self.global_step >= self.loss_config.adversarial_start

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of ``batch["images"]`` (B, 3, H, W) in [-1, 1]: the generator's plus the discriminator's.

        Raises:
            FloatingPointError: if a term is not finite on any rank.
        """
        images = batch["images"].to(memory_format=self.memory_format)
        output = self(images)
        loss, terms = self._generator_loss(images, output)
        discriminator_loss: Tensor | float = 0.0
        if self.game is not None and self.discriminator is not None and self._adversarial:
            terms["generator"] = self.game.generator_loss(self.discriminator, output.reconstruction)
            weight = self.game.generator_weight(terms, self.vqgan.decoder.last_weight, self.scaler)
            loss = loss + weight * terms["generator"]
            discriminator_loss, discriminator_terms = self.game.discriminator_loss(
                self.discriminator, images, output.reconstruction.detach()
            )
            terms |= discriminator_terms
        elif self.discriminator is not None and self.trainer.world_size > 1:
            # footgun: DDP waits for the gradient of every parameter, so the discriminator gets zeros before its start.
            discriminator_loss = 0.0 * sum(parameter.sum() for parameter in self.discriminator.parameters())
        self.check_finite({name: ~value.detach().isfinite() for name, value in terms.items()})
        self.train_codebook_usage.update(output.encoding.codes)
        if self.revival is not None:
            self.revival.update(output.encoding)
        self.log_dict({f"train/{name}": value.detach() for name, value in terms.items()}, batch_size=len(images))
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(images))
        return loss + discriminator_loss

    def _generator_loss(self, images: Tensor, output: VQGANOutput) -> tuple[Tensor, Terms]:
        used = self._lpips and (self.loss_config.perceptual_weight > 0 or not self.training)
        return generator_loss(self.loss_config, images, output, self._lpips[0] if used else None)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Exclude the discriminator from the step until its training starts: no moments, no weight decay."""
        if self.discriminator is not None and not self._adversarial:
            self.discriminator.zero_grad(set_to_none=True)

    def configure_optimizers(self) -> Any:
        """One AdamW over both networks. After each step, and before EMA and code revival, the quantiser is told."""
        configured = super().configure_optimizers()
        self._handles = [configured["optimizer"].register_step_post_hook(self._after_step)]
        return configured

    def on_fit_start(self) -> None:
        """Register code revival as a hook that runs after each optimizer step."""
        super().on_fit_start()
        if self.revival is not None:
            self._handles.append(self.trainer.optimizers[0].register_step_post_hook(self._revive_codes))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Put frozen parts into evaluation mode, without dropout, and announce a step to the quantiser."""
        super().on_train_batch_start(batch, batch_idx)
        self.frozen.eval(self.vqgan)
        if batch_idx % max(self.trainer.accumulate_grad_batches, 1) == 0:
            for quantizer in self._quantizers():
                quantizer.before_step()

    def teardown(self, stage: str) -> None:
        """Remove the hooks on the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _quantizers(self) -> list[Quantizer]:
        """The quantiser, and those inside of it."""
        return [module for module in self.vqgan.quantize.modules() if isinstance(module, Quantizer)]

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for quantizer in self._quantizers():
            quantizer.after_step()

    def _revive_codes(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        assert self.revival is not None
        if self.revival.is_due(optimizer, self.vqgan.quantize):
            self._revived = self.revival.revive(self.vqgan.quantize, optimizer, self.trainer.strategy)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the number of revived codes."""
        if self._revived is not None:
            self.log("train/revived_codes", float(self._revived))
            self._revived = None

    def on_train_epoch_end(self) -> None:
        """Log codebook usage and perplexity of the epoch, over all ranks, under ``train/``."""
        super().on_train_epoch_end()
        self._log_usage(self.train_codebook_usage.compute(), "train")
        self.train_codebook_usage.reset()

    def _log_usage(self, statistics: CodebookStatistics, stage: str) -> None:
        self.log(f"{stage}/codebook_usage", statistics.usage)
        self.log(f"{stage}/codebook_perplexity", statistics.perplexity)
        self.code_counts[stage] = statistics.counts

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Log loss terms, PSNR, SSIM and codebook usage under ``val/``; ``val/lpips`` is the perceptual term.

        Returns:
            ``reconstruction`` (B, 3, H, W) in about [-1, 1], for callbacks.
        """
        return {"reconstruction": self._evaluate(batch, "val")}

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Like :meth:`validation_step`, under ``test/``."""
        return {"reconstruction": self._evaluate(batch, "test")}

    def _evaluate(self, batch: dict[str, Any], stage: str) -> Tensor:
        images = batch["images"].to(memory_format=self.memory_format)
        output = self(images)
        with torch.autocast(images.device.type, enabled=False):  # metrics are computed in float32
            output = output._replace(reconstruction=output.reconstruction.float())
            loss, terms = self._generator_loss(images, output)
        broken = {name: ~value.isfinite() for name, value in terms.items()}
        self.stop_unless_finite(broken, lambda: self(images))
        for name, flag in broken.items() if self.trainer.state.fn == "fit" else ():
            self._broken_in_validation[name] = flag | self._broken_in_validation.get(name, False)
        self.metrics.update(images, output.reconstruction, output.encoding.codes)
        scalars = {f"{stage}/{'lpips' if name == 'perceptual' else name}": value for name, value in terms.items()}
        self.log_dict(scalars, batch_size=len(images), sync_dist=True)
        self.log(f"{stage}/loss", loss, batch_size=len(images), sync_dist=True, prog_bar=True)
        reconstruction: Tensor = output.reconstruction
        return reconstruction

    def on_validation_epoch_end(self) -> None:
        """Log metrics over the validation set and all ranks.

        Raises:
            FloatingPointError: if a loss term is not finite during fit, before a checkpoint of such weights is saved.
        """
        super().on_validation_epoch_end()
        broken, self._broken_in_validation = self._broken_in_validation, {}
        if broken:
            self.check_finite(broken, " in validation")
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log metrics over the test set and all ranks."""
        super().on_test_epoch_end()
        self._log_metrics("test")

    def _log_metrics(self, stage: str) -> None:
        # Lightning's `log` takes metrics of one result only; codebook usage has several.
        values, usage = self.metrics.finish()
        for name, value in values.items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "psnr")
        self._log_usage(usage, stage)

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Encode ``batch["images"]``, (B, A, 3, H, W) with A views per image, or (B, 3, H, W), to codes (B, A, h, w).

        Raises:
            FloatingPointError: if a latent or a codebook entry is not finite.
        """
        images = batch["images"] if batch["images"].ndim == 5 else batch["images"].unsqueeze(1)
        flat = images.flatten(0, 1).contiguous(memory_format=self.memory_format)
        encoding: Quantized = self.vqgan.encode(flat)
        self.stop_unless_finite(self.vqgan.quantize.broken_parts(encoding), lambda: self.vqgan.encode(flat))
        views: Tensor = encoding.codes.unflatten(0, images.shape[:2])
        return views

    def metric_names(self) -> list[str]:
        """Names of the values logged at each validation."""
        terms = [*["lpips"] * self._needs_lpips, *self.vqgan.quantize.loss_names, "reconstruction", "loss"]
        return [f"val/{name}" for name in (*terms, "psnr", "ssim", "codebook_usage", "codebook_perplexity")]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store how often each code has been used in this epoch, over all ranks."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[ENTRY][FREEZE] = list(self.frozen.parts)
        checkpoint[ENTRY]["code_counts"] = [
            self.trainer.strategy.reduce(counts.clone(), reduce_op="sum") for counts in self._running_counts()
        ]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counts of codes, on rank 0. Outside ``fit`` the discriminator is not loaded.

        Raises:
            ValueError: if the checkpoint holds another model or, for ``fit``, another discriminator.
        """
        super().on_load_checkpoint(checkpoint)
        state, own = checkpoint["state_dict"], self.state_dict()
        fit = self.trainer.state.fn == "fit"
        if fit:
            self.frozen.check_resumed(checkpoint[ENTRY])
        self.vqgan.codes_of = codes_of_entry(checkpoint[ENTRY])
        select_adversarial_state(state, own, fit)
        if self.trainer.is_global_zero:
            for counts, saved in zip(self._running_counts(), checkpoint[ENTRY].get("code_counts", []), strict=False):
                counts.copy_(saved)

    def _running_counts(self) -> list[Tensor]:
        metrics = [self.train_codebook_usage] + ([] if self.revival is None else [self.revival.usage])
        return [metric.counts for metric in metrics]
