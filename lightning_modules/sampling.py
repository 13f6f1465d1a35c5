"""What the autoregressive module needs to draw images of classes or captions. B batch, L codes, H × W pixels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_modules.base import GenerativeModule
from lightning_modules.optimization import AdamWConfig
from llamagen.checkpoints.contents import load_vqgan, weights_checksum
from llamagen.models.gpt import GPT
from llamagen.models.gpt_config import GPTConfig
from llamagen.models.vqgan import VQGAN
from llamagen.option_checks import option_named
from llamagen.sampling import Images, ImageSampler, SamplingConfig
from llamagen.sampling.pixels import check_image_size
from llamagen.text import TextEncoderConfig
from llamagen.text.condition import Condition, TextCondition


class SamplingModule(GenerativeModule):
    """Base of :class:`ARGenModule`: condition → codes → images.

    Tokenizer and text encoder are outside the state dict, the optimizer and EMA.

    Args:
        net: shape of the model.
        optimizer: settings of AdamW.
        sampling: how images are drawn.
        tokenizer: checkpoint of the tokenizer, which turns codes into images.
        sample_seed: seed of the images that ``predict`` draws.
        image_size: side in pixels to which all drawn images are resized; None leaves them as decoded.
        text_encoder: what reads the captions of a text model.

    Raises:
        ValueError: if the tokenizer is none or does not fit, or one of the others has no meaning.
    """

    gpt: GPT

    def __init__(
        self,
        net: GPTConfig,
        optimizer: AdamWConfig,
        sampling: SamplingConfig,
        tokenizer: Path | str | None,
        sample_seed: int,
        image_size: int | None,
        text_encoder: TextEncoderConfig | None,
    ) -> None:
        super().__init__(optimizer)
        if text_encoder is not None and net.condition != "text":
            raise ValueError(f"text_encoder is {text_encoder.name}, but the model is one of classes; leave it out")
        self._text = TextCondition(net, text_encoder or TextEncoderConfig()) if net.condition == "text" else None
        self.sampling = sampling
        check_image_size(image_size)
        if sample_seed % 1 != 0:
            raise ValueError(f"sample_seed is {sample_seed}; it must be a whole number")
        self.sample_seed, self.image_size = sample_seed, image_size
        self.sampler: ImageSampler | None = None  # of a callback that keeps one
        # In a tuple, so that nn.Module does not see it.
        self._tokenizer: tuple[VQGAN, ...] = ()
        self._tokenizer_checksum: str | None = None
        if tokenizer is not None:
            with option_named("tokenizer"):
                vqgan = load_vqgan(tokenizer)
            if vqgan.config.codebook_size != net.vocab_size:
                raise ValueError(
                    f"the tokenizer {tokenizer} has {vqgan.config.codebook_size} codes, but the model's vocab_size is "
                    f"{net.vocab_size}; set vocab_size to {vqgan.config.codebook_size} or choose another tokenizer"
                )
            self._tokenizer = (vqgan,)
            self._tokenizer_checksum = weights_checksum(vqgan)

    @property
    def tokenizer_checksum(self) -> str | None:
        """Checksum of the tokenizer's weights, see :func:`~llamagen.checkpoints.contents.weights_checksum`, or None."""
        return self._tokenizer_checksum

    @property
    def can_sample(self) -> bool:
        """Whether there is a tokenizer, to turn codes into images."""
        return bool(self._tokenizer)

    @property
    def num_classes(self) -> int:
        """Of the labels that the model knows."""
        return self.gpt.config.num_classes

    @property
    def image_side(self) -> int:
        """Of the images that it draws, in pixels.

        Raises:
            ValueError: if there is no tokenizer to tell.
        """
        self.check_sampling(())
        return self.image_size or self.gpt.config.grid_size * self._tokenizer[0].config.downsampling

    @property
    def needs_captions(self) -> bool:
        """Whether the model's condition is text."""
        return self._text is not None

    @property
    def caption_facts(self) -> dict[str, Any]:
        """What is known of the features of captions: of which encoder they are; of a model of classes nothing."""
        return dict(self._text.facts or {}) if self._text is not None else {}

    def check_sampling(self, classes: Sequence[int], prompts: Sequence[str] = ()) -> None:
        """Refuse to draw images that cannot be drawn.

        Args:
            classes: labels that will be asked for.
            prompts: texts that will be asked for; the encoder is then loaded.

        Raises:
            ValueError: if there is no tokenizer to turn codes into images, the model does not know a class or texts,
                or there is no text encoder.
        """
        if not self.can_sample:
            raise ValueError(
                "sampling needs the image tokenizer; set model.init_args.tokenizer to the checkpoint of its run"
            )
        if self._text is None and prompts:
            raise ValueError("prompts were asked for, but the model is one of classes; give classes")
        if self._text is not None and classes:
            raise ValueError("classes were asked for, but the model is one of text; give prompts")
        if unknown := [label for label in classes if not 0 <= label < self.gpt.config.num_classes]:
            raise ValueError(
                f"class {unknown[0]} was asked for, but the model knows the classes 0 to "
                f"{self.gpt.config.num_classes - 1}; ask for fewer classes, or set its num_classes"
            )
        if self._text is not None and prompts:
            _ = self._text.encoder

    def _check_tokenizer(self, checksum: str | None, what: str) -> None:
        if self._tokenizer_checksum is None:
            self._tokenizer_checksum = checksum
        elif checksum is not None and checksum != self._tokenizer_checksum:
            raise ValueError(
                f"{what} with a tokenizer of other weights (checksum {checksum[:12]}, here "
                f"{self._tokenizer_checksum[:12]}); set model.init_args.tokenizer to that tokenizer's checkpoint"
            )

    def condition_of(self, batch: dict[str, Any]) -> Condition:
        """What a batch asks for: its labels, or the features of its captions, see :meth:`TextCondition.of_batch`.

        Captions are encoded once: their features stay in the batch.

        Raises:
            ValueError: if a text model finds no captions.
        """
        if self._text is None:
            return Condition(batch["condition"], None, None)
        condition = self._text.of_batch(batch, self.device)
        if "captions" in batch:
            batch.update(condition=condition.features, caption_lengths=condition.lengths)
        return condition

    def on_predict_start(self) -> None:
        """See whether prompts are cleaned as the model's captions were."""
        self._compare_cleaning()

    def on_test_start(self) -> None:
        """See whether prompts are cleaned as the model's captions were."""
        self._compare_cleaning()

    def _compare_cleaning(self) -> None:  # when a checkpoint has been read, which knows
        data: Any = getattr(self.trainer, "datamodule", None)
        if self._text is not None and hasattr(data, "prompts"):
            self._text.warn_of_uncleaned(data.clean_captions)

    def build_sampler(self, batch_size: int, compiled: bool = False, int8: bool = False) -> ImageSampler:
        """What draws the module's images, see :class:`~llamagen.sampling.ImageSampler`.

        Raises:
            ValueError: if the module has no tokenizer, or it cannot be compiled.
        """
        self.check_sampling(())
        return ImageSampler(
            self.gpt, self._tokenizer[0], batch_size, compiled=compiled, int8=int8, image_size=self.image_size
        )

    def draw(
        self, condition: Tensor, indices: Tensor, seed: int, caption_lengths: Tensor | None = None
    ) -> tuple[Images, Tensor]:
        """Draw images with the module's sampling settings, and do not wait for them.

        Args:
            condition: (B,) labels or (B, C, caption_dim) caption features.
            indices: (B,) int64, number of each sample within the run.
            seed: seed of the run.
            caption_lengths: (B,) int64, for padded captions.

        Returns:
            B images and codes (B, L) int64.

        Raises:
            ValueError: if the module has no tokenizer to turn codes into images.
        """
        sampler = self.sampler or self.build_sampler(max(len(condition), 1))
        return sampler(condition, self.sampling, caption_lengths=caption_lengths, seed=seed, indices=indices)

    def sample(
        self, condition: Tensor, indices: Tensor, seed: int, caption_lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`draw`, but images come as (B, H, W, 3) uint8."""
        images, codes = self.draw(condition, indices, seed, caption_lengths)
        return images.tensor(), codes

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Images for what a batch asks for: ``images``, ``codes`` (B, L), ``index`` (B,).

        Of captions that are encoded here also ``truncated`` (B,) bool, on the CPU: which had more tokens than are read.
        """
        condition, lengths, truncated = self.condition_of(batch)
        images, codes = self.draw(condition, batch["index"], self.sample_seed, lengths)
        drawn = {"images": images, "codes": codes, "index": batch["index"]}
        return drawn if truncated is None else {**drawn, "truncated": truncated}
