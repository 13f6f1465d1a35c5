"""Images from a trained model: load it by a name, a folder or a file, and generate.

::

    model = LlamaGen.from_pretrained("c2i_L_384")
    images = model.generate(["golden retriever", 207], seed=0, guidance_scale=4.0, top_k=2000)
    images[0].save("dog.png")

Shapes: N images of S × S pixels, h × w codes of an image, h = w, L = h · w.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from llamagen.class_names import ClassNames
from llamagen.models.inputs import CodeInput, grids_of_codes, to_tensor
from llamagen.option_checks import check_integer
from llamagen.pretrained.conditions import ClassOrPrompt, as_list, to_condition
from llamagen.pretrained.editing import ImageEditing, OnImages, OnRow
from llamagen.pretrained.images import to_pillow
from llamagen.pretrained.loading import Parts, load_parts
from llamagen.pretrained.source import find_source
from llamagen.sampling import ImageSampler, PixelDecoder, SamplingConfig, should_compile, try_compiled

Dtype = Literal["float32", "bfloat16", "mixed"]
SETTINGS = tuple(each.name for each in fields(SamplingConfig))


class LlamaGen(ImageEditing):
    """A tokenizer and, unless it was loaded alone, the autoregressive model of its codes. Needs no Lightning.

    Build it with :meth:`from_pretrained`.

    Image k of a call depends on the seed, k, its condition and the settings, and not on the other images of the call:
    see ``docs/sampling.md`` for the precisions in which it is the same bit for bit. ``python main.py predict``
    generates the same images.

    Args:
        parts: models and what belongs to them.
        batch_size: images that are sampled at a time.
        compile: sample with compiled steps; None compiles models of at least 20 million parameters, where possible.

    Attributes:
        gpt: the autoregressive model; None for a tokenizer alone.
        tokenizer: the image tokenizer.
        sampling: default settings of sampling.
        class_names: names of the classes; None for text models.
        name: name of the model.
    """

    def __init__(self, parts: Parts, batch_size: int = 8, compile: bool | None = None) -> None:
        check_integer("batch_size", batch_size)
        super().__init__(parts.tokenizer)
        self.name, self.gpt = parts.name, parts.gpt
        self.sampling, self.dtype, self.batch_size = parts.sampling, parts.dtype, batch_size
        self.class_names: ClassNames | None = parts.class_names
        self._text, self._compile = parts.text, compile
        self._sampler: ImageSampler | None = None
        self._any_order_sampler: ImageSampler | None = None  # for orders that the first one cannot follow

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        tokenizer: str | Path | None = None,
        text_encoder: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: Dtype | torch.dtype | None = None,
        compile: bool | None = None,
        batch_size: int = 8,
    ) -> "LlamaGen":
        """Load a model, downloading it if it is remote.

        Args:
            source: a published name such as ``c2i_L_384``; a file of weights, local or
                ``hf://owner/repository/file[@revision]``; a folder or a repository of the hub (``owner/repository``)
                written by ``python -m llamagen.checkpoints.export``; or the folder of a run.
            tokenizer: file or published name of the tokenizer; by default the one that belongs to the model.
            text_encoder: name or folder of the T5 of a text model; by default that of the model, or FLAN-T5-XL.
            device: by default a GPU if there is one.
            dtype: ``bfloat16`` casts the weights, ``float32`` does not, and ``mixed`` keeps them in float32 and
                computes in bfloat16, like ``trainer.precision: bf16-mixed``. By default ``bfloat16`` for published
                models, and the precision of the run for others.
            compile: sample with compiled steps; None compiles models of at least 20 million parameters, where possible.
            batch_size: images that are sampled at a time. It limits the memory, and changes no image.

        Raises:
            ValueError: in one line, if the model does not exist, could not be downloaded, is damaged or does not fit.
            DiskFullError: in one line, if there is no room for a download.
        """
        parts = load_parts(find_source(source, tokenizer), text_encoder, device, dtype)
        return cls(parts, batch_size, compile)

    def __repr__(self) -> str:
        """Name, parameters, size of the images, precision."""
        model = "tokenizer" if self.gpt is None else f"{sum(p.numel() for p in self.gpt.parameters()):,} parameters"
        size = "" if self.resolution is None else f", {self.resolution} px"
        return f"LlamaGen({self.name}: {model}{size}, {self.dtype} on {self.device})"

    @property
    def resolution(self) -> int | None:
        """Side S of the generated images in pixels; None for a tokenizer alone, which takes images of any size."""
        return None if self.gpt is None else self.gpt.config.grid_size * self.tokenizer.config.downsampling

    @property
    def condition(self) -> Literal["class", "text"] | None:
        """What the model generates images of; None for a tokenizer alone."""
        return None if self.gpt is None else self.gpt.config.condition

    def generate(
        self,
        conditions: ClassOrPrompt | Sequence[ClassOrPrompt],
        *,
        images_per_prompt: int = 1,
        seed: int = 0,
        progress: bool = True,
        on_row: OnRow | None = None,
        on_images: OnImages | None = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """Generate images of classes or prompts.

        Args:
            conditions: classes, by number, name or some words of the name; or prompts for a text model.
            images_per_prompt: images of each condition. Image k of the result has condition k modulo their number, as
                on the command line, so that more images per condition keep the first ones.
            seed: any integer.
            progress: show a progress bar with the time left.
            on_row: called after each row of codes, see :class:`~llamagen.sampling.ImageSampler`; it may raise an error
                to stop.
            on_images: called with the finished images of each batch and the index of its first image.
            settings: fields of :class:`~llamagen.sampling.SamplingConfig`, such as ``guidance_scale=4.0``,
                ``top_k=2000``, ``top_p``, ``temperature``; :attr:`sampling` has the defaults.

        Returns:
            RGB images of S × S pixels.

        Raises:
            ValueError: in one line, if a class is unknown or ambiguous (with near ones), a setting is invalid, or this
                is a tokenizer.
            FloatingPointError: if logits or pixels are not finite.
        """
        return self._images(conditions, images_per_prompt, seed, progress, on_row, settings, on_images=on_images)

    def generate_codes(
        self,
        conditions: ClassOrPrompt | Sequence[ClassOrPrompt],
        *,
        kept: CodeInput | None = None,
        order: CodeInput | None = None,
        images_per_prompt: int = 1,
        seed: int | Sequence[int] = 0,
        indices: Sequence[int] | None = None,
        progress: bool = True,
        on_row: OnRow | None = None,
        **settings: Any,
    ) -> Tensor:
        """Like :meth:`generate`, but return the codes, (N, h, w) int64. :meth:`decode` turns them into the same images.

        Args:
            conditions: see :meth:`generate`.
            kept: (r, w) or (N, r, w), codes of the upper rows of each image, which are kept; with ``order`` (K,) or
                (N, K), the first K codes in that order.
            order: (L,) or (N, L), the raster position of each code in the order of generation, for models that were
                trained in random orders; None for raster order.
            images_per_prompt: see :meth:`generate`.
            seed: any integer; or one for each image.
            indices: index of each image: a server that joins requests to a batch generates image k of a request with
                seed and index of that request. None counts from 0.
            progress: see :meth:`generate`.
            on_row: see :meth:`generate`.
            settings: see :meth:`generate`.
        """
        call = self._call(conditions, images_per_prompt, seed, progress, on_row, settings, kept, order)
        with call as (sampler, arguments):
            codes: Tensor = sampler.sampler(**arguments, indices=indices)
            return codes.view(len(codes), *[self._require_gpt().config.grid_size] * 2)

    def prepare(self, **settings: Any) -> None:
        """Compile, allocate memory and load a text encoder before the first call with these settings."""
        config = self.settings(**settings)
        if self._text is not None:
            self._text([""], self.device)
        with self._precision():
            self._image_sampler(config).prepare(config)

    def settings(self, **settings: Any) -> SamplingConfig:
        """Settings of sampling: the given ones, and :attr:`sampling` for the others.

        Raises:
            ValueError: in one line, if there is no such setting, or a value is out of range.
        """
        if unknown := sorted(set(settings) - set(SETTINGS)):
            raise ValueError(f"there is no setting {unknown[0]!r} of sampling; the settings are {', '.join(SETTINGS)}")
        return replace(self.sampling, **settings)

    def preview(self, codes: Tensor, rows: int) -> list[Image.Image]:
        """Decode the first rows of images that are being generated, for ``on_row``.

        Pixels near the lower edge change when more rows follow.

        Args:
            codes: (N, L) int64.
            rows: number of rows of the grid whose codes are valid, at least 1.
        """
        assert self.gpt is not None
        side = self.gpt.config.grid_size
        return to_pillow(self._pixel_decoder().preview(codes.view(-1, side, side), rows).numpy())

    @contextmanager
    def _call(
        self,
        conditions: Any,
        per_condition: int,
        seed: int | Sequence[int],
        progress: bool,
        on_row: OnRow | None,
        settings: dict[str, Any],
        kept: Any = None,
        order: Any = None,
    ) -> Iterator[tuple[ImageSampler, dict[str, Any]]]:
        """The sampler and its arguments for a call, in the model's precision and with a progress bar."""
        gpt, config = self._require_gpt(), self.settings(**settings)
        check_integer("images_per_prompt", per_condition)
        each = as_list(conditions)
        condition, lengths = to_condition(each, self._text or self.class_names, self.device)
        rows = torch.arange(len(each) * per_condition, device=self.device) % max(len(each), 1)
        batches, side = -(-len(rows) // self.batch_size), gpt.config.grid_size
        with self._precision(), tqdm(total=batches * side, desc=self.name, unit="row", disable=not progress) as bar:

            def after_row(codes: Tensor, count: int, start: int) -> None:
                bar.update(start // self.batch_size * side + count // side - bar.n)
                if on_row is not None:
                    on_row(codes, count, start)

            yield (
                self._image_sampler(config, any_order=order is not None),
                {
                    "condition": condition[rows],
                    "config": config,
                    "caption_lengths": None if lengths is None else lengths[rows],
                    "seed": seed,
                    "kept": None if kept is None else self._kept(kept, len(each), order)[rows],
                    "order": None if order is None else _each(order, "order", len(each)).to(self.device)[rows],
                    "on_row": after_row if progress or on_row is not None else None,
                },
            )

    def _images(self, *call: Any, on_images: OnImages | None) -> list[Image.Image]:
        """Images of a call, see :meth:`_call`."""
        with self._call(*call) as (sampler, arguments):
            report = None if on_images is None else lambda batch, start: on_images(to_pillow(batch.numpy()), start)
            images, _ = sampler(**arguments, on_images=report)
            return to_pillow(images.numpy())

    def _kept(self, kept: Any, count: int, order: Any) -> Tensor:
        """Kept codes (n, K) of n conditions."""
        if order is not None:
            return _each(kept, "kept", count).to(self.device)
        gpt, given = self._require_gpt(), to_tensor(kept, "kept")
        grids = grids_of_codes(given[None] if given.dim() == 2 else given, gpt.config.vocab_size, self.device)
        if len(grids) not in (1, count) or (grids.shape[1] and grids.shape[2] != gpt.config.grid_size):
            raise ValueError(
                f"kept codes have the shape {tuple(grids.shape)}; they must be whole rows of {gpt.config.grid_size} "
                f"codes, for one or for each of {count} conditions"
            )
        return grids.flatten(1).expand(count, -1)

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "mixed")

    def _image_sampler(self, config: SamplingConfig, any_order: bool = False) -> ImageSampler:
        """The sampler of all calls, prepared for the settings of the first one."""
        build = partial(ImageSampler, self._require_gpt(), self.tokenizer, self.batch_size)
        with self._lock:
            if self._sampler is None and self._compile is None and should_compile(self._require_gpt()):
                self._sampler = try_compiled(partial(build, compiled=True), config)
            if self._sampler is None:
                self._sampler = build(compiled=bool(self._compile))
            if self._sampler.sampler.any_order or not any_order:
                return self._sampler
            if self._any_order_sampler is None:
                self._any_order_sampler = build()
            return self._any_order_sampler

    def _pixel_decoder(self) -> PixelDecoder:
        if self.gpt is None:
            return super()._pixel_decoder()
        with self._precision():
            return self._image_sampler(self.sampling).pixels


def _each(values: Any, name: str, count: int) -> Tensor:
    """Values (n, K) of n conditions, from (K,), (1, K) or (n, K)."""
    given = to_tensor(values, name)
    if given.dim() not in (1, 2) or (given.dim() == 2 and len(given) not in (1, count)):
        raise ValueError(
            f"{name} has the shape {tuple(given.shape)}; with an order it must have one row, or one for each of "
            f"{count} conditions"
        )
    return given.expand(count, -1)
