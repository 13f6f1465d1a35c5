"""Training and sampling of the autoregressive model. B batch, L codes, V vocabulary, H × W pixels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.base import GenerativeModule
from lightning_modules.optimization import AdamWConfig
from llamagen.checkpoint import load_vqgan, weights_checksum
from llamagen.models.gpt import GPT, GPTConfig
from llamagen.models.vqgan import VQGAN, to_uint8
from llamagen.sampling import SamplingConfig, generate
from llamagen.weights import ENTRY


class ARGenModule(GenerativeModule):
    """A GPT over the codes of a frozen image tokenizer.

    The tokenizer is only needed to turn codes into pictures (``predict`` and sample grids). It is outside the state
    dict, the optimizer and EMA.

    Args:
        net: shape of the model.
        optimizer: settings of AdamW.
        sampling: how pictures are drawn in ``predict`` and in sample grids.
        tokenizer: checkpoint of the tokenizer run whose codes the model learns.
        sample_seed: seed of the pictures that ``predict`` draws.
    """

    def __init__(
        self,
        net: GPTConfig,
        optimizer: AdamWConfig | None = None,
        sampling: SamplingConfig | None = None,
        tokenizer: Path | str | None = None,
        sample_seed: int = 0,
    ) -> None:
        super().__init__(optimizer or AdamWConfig())
        self.gpt = GPT(net)
        self.sampling = sampling or SamplingConfig()
        self.sample_seed = sample_seed
        # In a tuple, so that nn.Module does not see it.
        self._tokenizer: tuple[VQGAN, ...] = ()
        self._tokenizer_checksum: str | None = None
        if tokenizer is not None:
            vqgan = load_vqgan(tokenizer)
            if vqgan.config.codebook_size != net.vocab_size:
                raise ValueError(
                    f"the tokenizer {tokenizer} has {vqgan.config.codebook_size} codes, but the model's vocab_size is "
                    f"{net.vocab_size}; set vocab_size to {vqgan.config.codebook_size} or choose another tokenizer"
                )
            self._tokenizer = (vqgan,)
            self._tokenizer_checksum = weights_checksum(vqgan)

    @property
    def generator(self) -> GPT:
        """The GPT."""
        return self.gpt

    def setup(self, stage: str) -> None:
        """Refuse codes or requests that do not fit the model, before anything is written.

        Raises:
            ValueError: if vocabulary, grid, number of classes or tokenizer differ, or pictures cannot be drawn.
        """
        datamodule = getattr(self.trainer, "datamodule", None)
        if (meta := getattr(datamodule, "code_meta", None)) is not None:
            self._check_codes(meta)
        if stage == "predict":
            self.check_sampling(getattr(datamodule, "classes", ()))

    def check_sampling(self, classes: Sequence[int]) -> None:
        """Refuse to draw pictures that cannot be drawn.

        Args:
            classes: labels that will be asked for.

        Raises:
            ValueError: if there is no tokenizer to turn codes into pictures, or the model does not know a class.
        """
        if not self._tokenizer:
            raise ValueError(
                "sampling needs the image tokenizer; set model.init_args.tokenizer to the checkpoint of its run"
            )
        if unknown := [label for label in classes if not 0 <= label < self.gpt.config.num_classes]:
            raise ValueError(
                f"class {unknown[0]} was asked for, but the model knows the classes 0 to "
                f"{self.gpt.config.num_classes - 1}; ask for fewer classes"
            )

    def _check_codes(self, meta: dict[str, Any]) -> None:
        config = self.gpt.config
        if meta["vocabulary"] != config.vocab_size:
            raise ValueError(
                f"the codes come from a vocabulary of {meta['vocabulary']}, but the model's vocab_size is "
                f"{config.vocab_size}; set vocab_size to {meta['vocabulary']} or extract other codes"
            )
        height, width = meta["grid"]
        if (height, width) != (config.grid_size, config.grid_size):
            raise ValueError(
                f"the tokenizer's grid is {height} × {width} = {height * width} codes a picture, but the model's "
                f"block_size is {config.block_size}; "
                + (f"set block_size to {height * width}" if height == width else "the model needs a square grid")
                + " or extract other codes"
            )
        if config.condition == "class" and not meta["num_classes"]:
            raise ValueError("the codes have no classes, which the model needs; extract codes of pictures with classes")
        if config.condition == "class" and meta["num_classes"] > config.num_classes:
            raise ValueError(
                f"the codes have {meta['num_classes']} classes, but the model's num_classes is {config.num_classes}; "
                f"set num_classes to {meta['num_classes']}"
            )
        self._check_tokenizer(meta["tokenizer"], "the codes were extracted")

    def _check_tokenizer(self, checksum: str | None, what: str) -> None:
        if self._tokenizer_checksum is None:
            self._tokenizer_checksum = checksum
        elif checksum is not None and checksum != self._tokenizer_checksum:
            raise ValueError(
                f"{what} with a tokenizer of other weights (checksum {checksum[:12]}, here "
                f"{self._tokenizer_checksum[:12]}); set model.init_args.tokenizer to that tokenizer's checkpoint"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add which tokenizer the codes came from."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[ENTRY]["tokenizer"] = self._tokenizer_checksum

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another model, or one that was trained on the codes of another tokenizer.

        Raises:
            ValueError: in one line, with what differs.
        """
        super().on_load_checkpoint(checkpoint)
        self._check_tokenizer(checkpoint[ENTRY]["tokenizer"], "the checkpoint was trained on codes")

    def forward(self, codes: Tensor, condition: Tensor, caption_lengths: Tensor | None = None) -> Tensor:
        """Logits (B, L, V) of codes (B, L), each from the condition and the codes before it."""
        logits: Tensor = self.gpt(codes[:, :-1], condition, caption_lengths=caption_lengths)
        return logits

    def _loss(self, batch: dict[str, Any]) -> Tensor:
        codes = batch["codes"]
        logits = self(codes, batch["condition"], batch.get("caption_lengths"))
        return F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten())

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Mean cross entropy of ``batch["codes"]`` (B, L) int64 given ``batch["condition"]``, in nats a code."""
        loss = self._loss(batch)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch["codes"]))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """The same without dropout, as ``val/loss``."""
        self.log("val/loss", self._loss(batch), prog_bar=True, batch_size=len(batch["codes"]), sync_dist=True)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """The same as ``test/loss``."""
        self.log("test/loss", self._loss(batch), prog_bar=True, batch_size=len(batch["codes"]), sync_dist=True)

    def sample(
        self, condition: Tensor, indices: Tensor, seed: int, caption_lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw pictures with the module's sampling settings.

        Args:
            condition: (B,) labels or (B, C, caption_dim) caption features.
            indices: (B,) int64, number of each sample within the run.
            seed: seed of the run.
            caption_lengths: (B,) int64, for padded captions.

        Returns:
            Pictures (B, H, W, 3) uint8 and codes (B, L) int64.

        Raises:
            ValueError: if the module has no tokenizer to turn codes into pictures.
        """
        self.check_sampling(())
        codes = generate(
            self.gpt, condition, self.sampling, caption_lengths=caption_lengths, seed=seed, indices=indices
        )
        grid = self.gpt.config.grid_size
        tokenizer = self._tokenizer[0].to(codes.device)
        with torch.no_grad():
            pictures = to_uint8(tokenizer.decode_codes(codes.unflatten(1, (grid, grid))))
        return pictures.permute(0, 2, 3, 1), codes

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Pictures for ``batch["condition"]``: ``images`` (B, H, W, 3) uint8, ``codes`` (B, L), ``index`` (B,)."""
        images, codes = self.sample(batch["condition"], batch["index"], self.sample_seed, batch.get("caption_lengths"))
        return {"images": images, "codes": codes, "index": batch["index"]}

    def configure_optimizers(self) -> Any:
        """AdamW over the whole model."""
        return self.build_optimizer([self.gpt])
