"""Base of the autoregressive module: sampling of images from classes or captions. B batch, L codes, H × W pixels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_modules.base import GenerativeModule
from lightning_modules.optimization import AdamWConfig
from llamagen.checkpoints.contents import load_vqgan, read_checkpoint, weights_checksum
from llamagen.checkpoints.lineage import codes_checksum
from llamagen.checkpoints.weights import ENTRY, classes_of
from llamagen.class_names import ClassNames, class_names_of
from llamagen.models.gpt import GPT
from llamagen.models.gpt_config import GPTConfig
from llamagen.models.vqgan import VQGAN
from llamagen.option_checks import option_named
from llamagen.sampling import Images, ImageSampler, SamplingConfig
from llamagen.sampling.pixels import check_image_size
from llamagen.text import Condition, TextCondition, TextEncoderConfig
from llamagen.text.cleaning import UNKNOWN, RecordedCleaning


class SamplingModule(GenerativeModule):
    """Base of :class:`ARGenModule`: condition → codes → images.

    Tokenizer and text encoder are outside the state dict, the optimizer and EMA.

    Args:
        net: shape of the model.
        optimizer: settings of AdamW.
        sampling: guidance, temperature, top-k and top-p.
        tokenizer: checkpoint of the tokenizer that decodes codes into images, or its name or address on the hub.
        sample_seed: seed of the images of ``predict``.
        image_size: side in pixels to which generated images are resized; None keeps the decoded size.
        text_encoder: encoder of the captions of a text-conditional model.

    Raises:
        ValueError: if the tokenizer cannot be loaded or does not match ``net``, or another argument is invalid.
    """

    gpt: GPT

    def __init__(
        self,
        net: GPTConfig,
        optimizer: AdamWConfig,
        sampling: SamplingConfig,
        tokenizer: str | Path | None,
        sample_seed: int,
        image_size: int | None,
        text_encoder: TextEncoderConfig | None,
    ) -> None:
        super().__init__(optimizer)
        if text_encoder is not None and net.condition != "text":
            raise ValueError(f"text_encoder is {text_encoder.name}, but the model is class-conditional; leave it out")
        self._text = TextCondition(net, text_encoder or TextEncoderConfig()) if net.condition == "text" else None
        self.sampling = sampling
        check_image_size(image_size)
        if sample_seed % 1 != 0:
            raise ValueError(f"sample_seed is {sample_seed}; it must be an integer")
        self.sample_seed, self.image_size = sample_seed, image_size
        self._classes: list[str] | None = None
        self._names_were_used = False
        self.sampler: ImageSampler | None = None  # set by CompiledSampling for the length of a stage
        # footgun: not a submodule. The tuple hides it from nn.Module, so from state dict, optimizer, EMA and FSDP.
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
            self._tokenizer_checksum = codes_checksum(vqgan)

    @property
    def tokenizer_checksum(self) -> str | None:
        """Checksum of the weights that decode codes, None without a tokenizer. See
        :func:`~llamagen.checkpoints.contents.weights_checksum`.

        Unlike the checksum under which codes are recorded, it differs if the decoder alone has been fine-tuned.
        """
        return weights_checksum(self._tokenizer[0]) if self._tokenizer else None

    @property
    def can_sample(self) -> bool:
        """Whether there is a tokenizer to decode codes."""
        return bool(self._tokenizer)

    @property
    def num_classes(self) -> int:
        """Number of classes of the model."""
        return self.gpt.config.num_classes

    @property
    def class_names(self) -> ClassNames | None:
        """Names of the model's classes: those of the data it was trained on, or ImageNet's if it has 1,000 classes and
        no names of its own. None if the classes have no names, or the model is text-conditional.
        """
        if self._text is not None:
            return None
        self._names_were_used = True
        return class_names_of(self._classes, self.num_classes)

    def take_class_names(self, path: Path | str) -> None:
        """Take the class names of a checkpoint that will be loaded.

        footgun: requests are resolved in ``setup``, but Lightning loads the checkpoint after it.

        Args:
            path: the checkpoint; its weights are not read.

        Raises:
            ValueError: in one line, if it is not a checkpoint of this project.
        """
        self._classes = classes_of(read_checkpoint(path, wanted=lambda _: False)[ENTRY])

    @property
    def output_size(self) -> int:
        """Side of the generated images in pixels.

        Raises:
            ValueError: if there is no tokenizer.
        """
        self.check_requests(())
        return self.image_size or self.gpt.config.grid_size * self._tokenizer[0].config.downsampling

    @property
    def needs_captions(self) -> bool:
        """Whether the model is text-conditional."""
        return self._text is not None

    @property
    def caption_metadata(self) -> dict[str, Any]:
        """Encoder and cleaning of the captions the model was trained on; empty if unknown or class-conditional."""
        return dict(self._text.metadata or {}) if self._text is not None else {}

    def check_requests(self, classes: Sequence[int], prompts: Sequence[str] = ()) -> None:
        """Check that the model can generate images of these classes or prompts.

        Args:
            classes: requested labels.
            prompts: requested texts. If there are any, the text encoder is loaded.

        Raises:
            ValueError: if there is no tokenizer, a class is out of range, the model has the other kind of condition,
                or the text encoder is not available.
        """
        if not self.can_sample:
            raise ValueError(
                "sampling needs the image tokenizer; set model.init_args.tokenizer to the checkpoint of its run"
            )
        if self._text is None and prompts:
            raise ValueError("prompts were given, but the model is class-conditional; give classes")
        if self._text is not None and classes:
            raise ValueError("classes were given, but the model is text-conditional; give prompts")
        if unknown := [label for label in classes if not 0 <= label < self.gpt.config.num_classes]:
            raise ValueError(
                f"class {unknown[0]} was requested, but the model has classes 0 to {self.gpt.config.num_classes - 1}; "
                "request other classes, or set num_classes to that of the checkpoint"
            )
        if self._text is not None and prompts:
            _ = self._text.encoder  # loads it

    def _check_tokenizer(self, checksum: str | None, what: str) -> None:
        if self._tokenizer_checksum is None:
            self._tokenizer_checksum = checksum
        elif checksum is not None and checksum != self._tokenizer_checksum:
            raise ValueError(
                f"{what} with a tokenizer of other weights (checksum {checksum[:12]}, loaded "
                f"{self._tokenizer_checksum[:12]}); set model.init_args.tokenizer to that tokenizer's checkpoint"
            )

    def batch_condition(self, batch: dict[str, Any]) -> Condition:
        """Condition of a batch: labels, or features of captions, see :meth:`TextCondition.from_batch`.

        Captions are encoded once: their features are put into the batch.

        Raises:
            ValueError: if the model is text-conditional and the batch has no captions.
        """
        if self._text is None:
            return Condition(batch["condition"], None, None)
        condition = self._text.from_batch(batch, self.device)
        if "captions" in batch:
            batch.update(condition=condition.features, caption_lengths=condition.lengths)
        return condition

    @property
    def caption_cleaning(self) -> RecordedCleaning:
        """Cleaning of the captions the model was trained on, see :attr:`TextCondition.cleaning`."""
        return self._text.cleaning if self._text is not None else UNKNOWN

    def check_prompt_cleaning(self, option: str | bool | None) -> None:
        """Check that prompts are cleaned like the captions of training, see :meth:`TextCondition.check_prompts`.

        Raises:
            ValueError: in one line, if they are not.
        """
        if self._text is not None:
            self._text.check_prompts(option)

    def build_sampler(self, batch_size: int, compiled: bool = False, int8: bool = False) -> ImageSampler:
        """Sampler for the module's images, see :class:`~llamagen.sampling.ImageSampler`.

        Raises:
            ValueError: if the module has no tokenizer, or the sampler cannot be compiled.
        """
        self.check_requests(())
        return ImageSampler(
            self.gpt, self._tokenizer[0], batch_size, compiled=compiled, int8=int8, image_size=self.image_size
        )

    def sample_async(
        self, condition: Tensor, indices: Tensor, seed: int, caption_lengths: Tensor | None = None
    ) -> tuple[Images, Tensor]:
        """Generate images with the module's sampling settings, without waiting for their pixels.

        Args:
            condition: (B,) int64 labels or (B, C, W) caption features, padded on the left.
            indices: (B,) int64, index of each sample within the run. The random numbers depend on it and on ``seed``.
            seed: seed of the run.
            caption_lengths: (B,) int64 in [1, C], number of tokens of each caption; None if no caption is padded.

        Returns:
            B images, decoded while the next batch is sampled (:class:`~llamagen.sampling.Images`), and codes (B, L)
            int64.

        Raises:
            ValueError: if the module has no tokenizer.
        """
        sampler = self.sampler or self.build_sampler(max(len(condition), 1))
        return sampler(condition, self.sampling, caption_lengths=caption_lengths, seed=seed, indices=indices)

    def sample(
        self, condition: Tensor, indices: Tensor, seed: int, caption_lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Like :meth:`sample_async`, but wait for the images, (B, H, W, 3) uint8."""
        images, codes = self.sample_async(condition, indices, seed, caption_lengths)
        return images.tensor(), codes

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Generate images for the classes or captions of a batch: ``images``, ``codes`` (B, L) and ``index`` (B,).

        If captions are encoded in this call, also ``truncated`` (B,) bool on the CPU: whether a caption has more than C
        tokens.
        """
        condition, lengths, truncated = self.batch_condition(batch)
        images, codes = self.sample_async(condition, batch["index"], self.sample_seed, lengths)
        generated = {"images": images, "codes": codes, "index": batch["index"]}
        return generated if truncated is None else {**generated, "truncated": truncated}
