"""Training of the image tokenizer. B batch, H × W pixels, h × w code grid, K codes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import convert_conv2d_weight_memory_format

from lightning_modules.adversarial import AdversarialGame, Terms
from lightning_modules.base import GenerativeModule
from lightning_modules.code_checks import broken_parts, check_codebook_size
from lightning_modules.code_revival import CodeRevival
from lightning_modules.optimization import AdamWConfig
from lightning_modules.reconstruction_metrics import ReconstructionMetrics
from lightning_modules.vqgan_config import VQGANLossConfig
from llamagen.checkpoints.weights import ENTRY, differences, load_weights, read_weights, strip_prefix
from llamagen.distributed.across_ranks import mean_over_ranks
from llamagen.finite import check_finite
from llamagen.losses import codebook_loss, commitment_loss, entropy_loss
from llamagen.metrics import CodebookStatistics, CodebookUsage
from llamagen.models.discriminator import Discriminator, PatchGAN
from llamagen.models.lpips import LPIPS, MIN_SIZE, fetch_vgg16, read_vgg16
from llamagen.models.vqgan import VQGAN, VQGANConfig, VQGANOutput
from llamagen.option_checks import check_integer, option_named


class VQGANModule(GenerativeModule):
    """Tokenizer and discriminator, trained by one optimizer in one pass.

    Each step reconstructs, takes the generator's loss with the discriminator frozen, takes the discriminator's loss on
    the detached reconstruction, and returns their sum: neither network sees the other's gradient, and the result is
    that of two optimizers. On several ranks it is that of one process with the whole batch.

    Args:
        net: shape of the tokenizer.
        loss: terms of its loss and their weights.
        discriminator: ``PatchGAN`` (the default) or ``StyleGAN``, with its settings.
        optimizer: settings of AdamW, for both networks.
        augmentation: what is done to images before the discriminator sees them, real or not: any of ``color``,
            ``translation`` and ``cutout``; for few images.
        lpips_weights: file of the VGG16 that LPIPS needs, as torchvision publishes it; None looks into torch.hub's
            cache and downloads it if it is not there. If given, validation measures LPIPS also where it has no weight.
        revive_codes_every: optimizer steps after which codes that were not used meanwhile are moved to latents of the
            current batch; 0 for never.
        init_from: weights to start from: a published ``.pt``, a checkpoint of this project, or safetensors.
        init_averaged: take the averaged (EMA) weights of ``init_from``, where it has them.
        channels_last: keep the channels of a pixel together in memory, which suits convolutions on GPUs.
        compile: compile encoder, decoder and LPIPS; takes minutes at the start.
        activation_checkpointing: recompute the blocks of encoder and decoder in the backward pass; less memory for a
            third more work.
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
        init_from: Path | str | None = None,
        init_averaged: bool = True,
        channels_last: bool = True,
        compile: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(optimizer or AdamWConfig(weight_decay=0.0))
        self.loss_config = loss or VQGANLossConfig()
        check_codebook_size(size := (net or VQGANConfig()).codebook_size)
        self.vqgan = VQGAN(net)
        self.vqgan.checkpoint_activations(activation_checkpointing)
        adversarial = self.loss_config.adversarial_weight > 0
        self.discriminator = (discriminator or PatchGAN()) if adversarial else None
        self.game = AdversarialGame(self.loss_config, augmentation) if adversarial else None
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._compile = compile
        if lpips_weights is not None:
            fetch_vgg16(lpips_weights)
        self.lpips_weights = lpips_weights
        # In a tuple, so that nn.Module does not see it: it is in no state dict and no optimizer.
        self._lpips: tuple[LPIPS, ...] = ()
        self.metrics = ReconstructionMetrics(size)
        self.train_codebook_usage = CodebookUsage(size)
        check_integer("revive_codes_every", revive_codes_every, 0)
        self.revival = CodeRevival(size, revive_codes_every) if revive_codes_every else None
        self._revived: int | None = None
        self._handles: list[Any] = []
        self.code_counts: dict[str, Tensor] = {}
        self._broken_in_validation: Terms = {}
        self._foreign_discriminator: ValueError | None = None
        if init_from is not None:
            self._start_from(init_from, init_averaged)

    def _start_from(self, path: Path | str, averaged: bool) -> None:
        with option_named("init_from"):
            weights = read_weights(path, averaged)
        if weights.architecture not in (None, "VQGAN"):
            raise ValueError(
                f"init_from {path} holds a {weights.architecture}, not a VQGAN; give a tokenizer's weights"
            )
        with option_named("init_from"):
            load_weights(self.vqgan, weights.state, weights.source)
        if self.discriminator is None:
            return
        if weights.discriminator is None:
            rank_zero_warn(f"{path} has no discriminator: training starts with a new one")
        else:
            advice = (
                "choose its model.init_args.discriminator, or leave it out of the file with llamagen.checkpoints.export"
            )
            try:
                load_weights(self.discriminator, weights.discriminator, f"the discriminator of {path} ({advice})")
            except ValueError as error:  # which matters to a training alone
                self._foreign_discriminator = error

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
        """Fetch the weights of LPIPS, in one process of each machine."""
        if self._needs_lpips:
            fetch_vgg16(self.lpips_weights)

    @property
    def _needs_lpips(self) -> bool:
        wanted = self.loss_config.perceptual_weight > 0 or self.lpips_weights is not None
        return wanted and self.trainer.state.fn != "predict"

    def setup(self, stage: str) -> None:
        """Refuse images that do not fit the networks, now and not when the discriminator starts; get LPIPS ready.

        Raises:
            ValueError: if the size is not a multiple of the downsampling factor, or does not suit a network; if
                ``init_from`` has another discriminator, or the precision is not right for training.
        """
        super().setup(stage)
        if stage == "fit" and self._foreign_discriminator is not None:
            raise self._foreign_discriminator
        size = getattr(getattr(self.trainer, "datamodule", None), "image_size", None)
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
                    "model.init_args.loss.perceptual_weight 0 to do without it"
                )
        if self._needs_lpips and not self._lpips:
            self._lpips = (LPIPS(read_vgg16(self.lpips_weights)),)
        for network in (self.vqgan, self.discriminator, *self._lpips):
            if network is not None:
                convert_conv2d_weight_memory_format(network, self.memory_format)
        if self._compile:
            if self.loss_config.adaptive_weight:  # it runs through the compiled decoder a second time
                torch._functorch.config.donated_buffer = False
            for part in (self.vqgan.encoder, self.vqgan.decoder, *self._lpips):
                part.compile()  # in place: the names in the state dict stay

    def forward(self, images: Tensor) -> VQGANOutput:
        """Reconstruct images (B, 3, H, W) in [-1, 1]."""
        output: VQGANOutput = self.vqgan(images.to(memory_format=self.memory_format))
        return output

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] after encoding and decoding, same shape, not clamped.

        Raises:
            FloatingPointError: if they are not finite.
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
        loss, terms = self._generator_terms(images, output, mean_over_ranks)
        discriminator_loss: Tensor | float = 0.0
        if self.game is not None and self.discriminator is not None and self._adversarial:
            terms["generator"] = self.game.generator_loss(self.discriminator, output.reconstruction)
            weight = self.game.generator_weight(terms, self.vqgan.decoder.last_weight, self.scaler)
            loss = loss + weight * terms["generator"]
            discriminator_loss, more = self.game.discriminator_loss(
                self.discriminator, images, output.reconstruction.detach()
            )
            terms |= more
        elif self.discriminator is not None and self.trainer.world_size > 1:
            # DDP waits for every parameter: before the start they take part with a gradient of zero.
            discriminator_loss = 0.0 * sum(parameter.sum() for parameter in self.discriminator.parameters())
        self.check_finite({name: ~value.detach().isfinite() for name, value in terms.items()})
        self.train_codebook_usage.update(output.encoding.codes)
        if self.revival is not None:
            self.revival.see(output.encoding)
        self.log_dict({f"train/{name}": value.detach() for name, value in terms.items()}, batch_size=len(images))
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(images))
        return loss + discriminator_loss

    def _generator_terms(
        self, images: Tensor, output: VQGANOutput, mean_of_ranks: Callable[[Tensor], Tensor] | None
    ) -> tuple[Tensor, Terms]:
        """The generator's loss without the adversarial part, and its unweighted terms."""
        encoding, config = output.encoding, self.loss_config
        difference = F.mse_loss if config.reconstruction == "l2" else F.l1_loss
        terms = {
            "reconstruction": difference(output.reconstruction.float(), images.float()),
            "codebook": codebook_loss(encoding.entries, encoding.latent),
            "commitment": commitment_loss(encoding.entries, encoding.latent),
        }
        if self._lpips and (config.perceptual_weight > 0 or not self.training):
            terms["perceptual"] = self._lpips[0].to(images.device)(output.reconstruction, images).mean()
        if config.entropy_weight > 0:
            terms["entropy"] = entropy_loss(encoding.latent, self.vqgan.quantize.codebook(), mean_of_ranks)
        loss = sum((getattr(config, f"{name}_weight") * value for name, value in terms.items()), torch.zeros(()))
        return loss, terms

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave the discriminator alone before its start: no moments, no weight decay."""
        if self.discriminator is not None and not self._adversarial:
            self.discriminator.zero_grad(set_to_none=True)

    def on_fit_start(self) -> None:
        """Follow the optimizer, for the revival of codes."""
        super().on_fit_start()
        if self.revival is not None:
            self._handles = [self.trainer.optimizers[0].register_step_post_hook(self._revive_codes)]

    def teardown(self, stage: str) -> None:
        """Let go of the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _revive_codes(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        assert self.revival is not None
        if self.revival.is_due(optimizer, self.vqgan.quantize):
            self._revived = self.revival.revive(self.vqgan.quantize, optimizer, self.trainer.strategy)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log how many codes came back to life."""
        if self._revived is not None:
            self.log("train/revived_codes", float(self._revived))
            self._revived = None

    def on_train_epoch_end(self) -> None:
        """Codebook usage and perplexity of the epoch, over all ranks, under ``train/``."""
        super().on_train_epoch_end()
        self._log_usage(self.train_codebook_usage.compute(), "train")
        self.train_codebook_usage.reset()

    def _log_usage(self, statistics: CodebookStatistics, stage: str) -> None:
        self.log(f"{stage}/codebook_usage", statistics.usage)
        self.log(f"{stage}/codebook_perplexity", statistics.perplexity)
        self.code_counts[stage] = statistics.counts

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Loss terms, PSNR, SSIM and codebook usage under ``val/``; LPIPS is its loss term.

        Returns:
            ``reconstruction`` (B, 3, H, W) in about [-1, 1], for callbacks.
        """
        return {"reconstruction": self._evaluate(batch, "val")}

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """The same under ``test/``."""
        return {"reconstruction": self._evaluate(batch, "test")}

    def _evaluate(self, batch: dict[str, Any], stage: str) -> Tensor:
        images = batch["images"].to(memory_format=self.memory_format)
        output = self(images)
        with torch.autocast(images.device.type, enabled=False):  # numbers to compare are not rounded to 16 bits
            output = output._replace(reconstruction=output.reconstruction.float())
            # Ranks may have unequal numbers of batches here, so none may wait for another.
            loss, terms = self._generator_terms(images, output, None)
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
        """Metrics over the whole validation set and all ranks.

        Raises:
            FloatingPointError: if a term is not finite while training: before a checkpoint is made of such weights.
        """
        super().on_validation_epoch_end()
        broken, self._broken_in_validation = self._broken_in_validation, {}
        if broken:
            self.check_finite(broken, " in validation")
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Metrics over the whole test set and all ranks."""
        super().on_test_epoch_end()
        self._log_metrics("test")

    def _log_metrics(self, stage: str) -> None:
        # Computed here, not handed to `log` as metrics: usage has several results.
        numbers, usage = self.metrics.finish()
        for name, value in numbers.items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "psnr")
        self._log_usage(usage, stage)

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Codes (B, A, h, w) int64 of ``batch["images"]``, (B, A, 3, H, W) with A views of each, or (B, 3, H, W).

        Raises:
            FloatingPointError: if a latent, or the entry that is nearest to it, is not finite.
        """
        images = batch["images"] if batch["images"].ndim == 5 else batch["images"].unsqueeze(1)
        flat = images.flatten(0, 1).contiguous(memory_format=self.memory_format)
        encoding = self.vqgan.encode(flat)
        self.stop_unless_finite(broken_parts(encoding), lambda: self.vqgan.encode(flat))
        views: Tensor = encoding.codes.unflatten(0, images.shape[:2])
        return views

    def metric_names(self) -> list[str]:
        """Names of what is logged at each validation."""
        terms = ["lpips"] * self._needs_lpips + ["entropy"] * (self.loss_config.entropy_weight > 0)
        terms += ["reconstruction", "codebook", "commitment", "loss"]
        return [f"val/{name}" for name in (*terms, "psnr", "ssim", "codebook_usage", "codebook_perplexity")]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add how often each code was used since the epoch began, over all ranks."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[ENTRY]["code_counts"] = [
            self.trainer.strategy.reduce(counts.clone(), reduce_op="sum") for counts in self._running_counts()
        ]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting, on the first rank. Outside of ``fit`` the discriminator does not matter, and is not loaded.

        Raises:
            ValueError: if it is the checkpoint of another model, or training is to go on with another discriminator.
        """
        super().on_load_checkpoint(checkpoint)
        state, own = checkpoint["state_dict"], self.state_dict()
        fit = self.trainer.state.fn == "fit"
        if fit and (
            differing := differences(strip_prefix("discriminator.", state), strip_prefix("discriminator.", own))
        ):
            raise ValueError(
                f"the checkpoint's discriminator is another one: {differing}; use model.init_args.discriminator and "
                "loss.adversarial_weight of its run, or start anew with model.init_args.init_from"
            )
        optional = ("game.",) if fit else ("game.", "discriminator.")
        saved = {name: state.pop(name) for name in list(state) if name.startswith(optional)}
        state |= {
            name: saved[name] if fit and name in saved else value
            for name, value in own.items()
            if name.startswith(optional)
        }
        if self.trainer.is_global_zero:
            for counts, saved in zip(self._running_counts(), checkpoint[ENTRY].get("code_counts", []), strict=False):
                counts.copy_(saved)

    def _running_counts(self) -> list[Tensor]:
        metrics = [self.train_codebook_usage] + ([] if self.revival is None else [self.revival.usage])
        return [metric.counts for metric in metrics]
