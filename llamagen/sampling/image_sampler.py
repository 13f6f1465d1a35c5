"""Condition → codes → pixels."""

from collections.abc import Callable, Mapping
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from llamagen.models.gpt import GPT
from llamagen.models.vqgan import VQGAN
from llamagen.sampling.config import SamplingConfig
from llamagen.sampling.inputs import Condition, Numbers, SamplingRequest
from llamagen.sampling.pixels import Images, PixelDecoder
from llamagen.sampling.sampler import OnRow, Sampler, compute_dtype

OnImages = Callable[[Images, int], object]


class ImageSampler:
    """Samples images in batches, for many calls with the same memory and compiled code.

    Args:
        gpt: model of the codes.
        tokenizer: its decoder turns codes into pixels.
        batch_size: see :class:`~llamagen.sampling.sampler.Sampler`.
        compiled: see :class:`~llamagen.sampling.sampler.Sampler`.
        int8: see :class:`~llamagen.sampling.sampler.Sampler`.
        image_size: see :class:`~llamagen.sampling.pixels.PixelDecoder`.

    Raises:
        ValueError: if the tokenizer has fewer codes than the model; also as :class:`~llamagen.sampling.sampler.Sampler`
            and :class:`~llamagen.sampling.pixels.PixelDecoder` do.
    """

    def __init__(
        self,
        gpt: GPT,
        tokenizer: VQGAN,
        batch_size: int,
        *,
        compiled: bool = False,
        int8: bool = False,
        image_size: int | None = None,
    ) -> None:
        if gpt.config.vocab_size > tokenizer.config.codebook_size:
            raise ValueError(
                f"the model generates codes 0 to {gpt.config.vocab_size - 1}, but the tokenizer has only "
                f"{tokenizer.config.codebook_size}; use the tokenizer whose codes the model was trained on"
            )
        self.sampler = Sampler(gpt, batch_size, compiled=compiled, int8=int8)
        dtype = compute_dtype(gpt)  # activations of the tokenizer's decoder may overflow in float16
        dtype = torch.float32 if dtype is torch.float16 else dtype
        self.pixels = PixelDecoder(tokenizer, gpt.output.weight.device, dtype, image_size)

    def prepare(self, config: SamplingConfig) -> None:
        """Allocate memory and compile for calls with these settings, before the first call."""
        self.sampler.prepare(config)

    def __call__(
        self,
        condition: Condition,
        config: SamplingConfig | Mapping[str, Any] | None = None,
        *,
        caption_lengths: Numbers | None = None,
        seed: int | Numbers = 0,
        indices: Numbers | None = None,
        kept: Numbers | None = None,
        order: Numbers | None = None,
        on_row: OnRow | None = None,
        on_images: OnImages | None = None,
    ) -> tuple[Images, Tensor]:
        """Sample an image for each condition. Other arguments and errors are those of a call of a ``Sampler``.

        Args:
            condition: see ``Sampler``.
            config: see ``Sampler``.
            caption_lengths: see ``Sampler``.
            seed: see ``Sampler``.
            indices: see ``Sampler``.
            kept: see ``Sampler``.
            order: see ``Sampler``.
            on_row: see ``Sampler``.
            on_images: called with the images of each batch when it is sampled, and the index of the first within the
                call. footgun: on a GPU, reading them waits until they are decoded.

        Returns:
            N images, which a GPU may still be decoding, and their codes (N, L) int64.

        Raises:
            FloatingPointError: if logits or pixels are not finite; for pixels on a GPU when the images are read.
        """
        gpt = self.sampler.gpt
        request = SamplingRequest.from_inputs(gpt, condition, config, caption_lengths, seed, indices, kept, order)
        size, images, codes = self.sampler.batch_size, list[Images](), list[Tensor]()
        for start in range(0, max(len(request), 1), size):  # on a GPU a batch is decoded while the next one is sampled
            report = None if on_row is None else _shifted(on_row, start)
            sampled, check = self.sampler.unchecked(request.rows(slice(start, start + size)), report)
            side = isqrt(sampled.shape[1])
            images.append(self.pixels(sampled.unflatten(1, (side, side))))
            check()  # waits for the codes, not for the pixels
            codes.append(sampled)
            if on_images is not None:
                on_images(images[-1], start)
        return Images.concatenate(images), torch.cat(codes)


def _shifted(on_row: OnRow, first: int) -> OnRow:
    """Callback for a part of a call, which begins with image ``first``."""
    return lambda codes, count, start: on_row(codes, count, first + start)
