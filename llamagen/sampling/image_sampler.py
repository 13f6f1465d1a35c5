"""Condition → codes → pixels."""

from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from llamagen.models.gpt import GPT
from llamagen.models.vqgan import VQGAN
from llamagen.sampling.config import SamplingConfig
from llamagen.sampling.inputs import Condition, Numbers, as_condition, as_numbers
from llamagen.sampling.pixels import Images, PixelDecoder
from llamagen.sampling.sampler import Sampler, compute_dtype


class ImageSampler:
    """Draws images, in batches, with memory that serves many calls.

    Args:
        gpt: draws the codes.
        tokenizer: turns them into pixels.
        batch_size: see :class:`~llamagen.sampling.sampler.Sampler`.
        compiled: see there.
        int8: see there.
        image_size: see :class:`~llamagen.sampling.pixels.PixelDecoder`.

    Raises:
        ValueError: see there, or if the tokenizer has fewer codes than the model.
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
        dtype = compute_dtype(gpt)  # the decoder's activations may be too large for float16
        dtype = torch.float32 if dtype is torch.float16 else dtype
        self.pixels = PixelDecoder(tokenizer, gpt.output.weight.device, dtype, image_size)

    def prepare(self, config: SamplingConfig) -> None:
        """Allocate and compile for calls with these settings, before the first."""
        self.sampler.prepare(config)

    def __call__(
        self,
        condition: Condition,
        config: SamplingConfig | Mapping[str, Any] | None = None,
        *,
        caption_lengths: Numbers | None = None,
        seed: int = 0,
        indices: Numbers | None = None,
    ) -> tuple[Images, Tensor]:
        """Draw an image for each condition; arguments and errors are those of a ``Sampler``.

        Returns:
            N images and their codes (N, L) int64. A GPU may still be working on the images when the next call
            begins.

        Raises:
            FloatingPointError: if logits or pixels are not finite; of pixels on a GPU when the images are fetched.
        """
        size, images, codes = self.sampler.batch_size, [], []
        condition = as_condition(self.sampler.gpt, condition)
        caption_lengths = as_numbers(caption_lengths, "caption_lengths", condition.device)
        numbers = as_numbers(indices, "indices", condition.device)
        indices = torch.arange(len(condition), device=condition.device) if numbers is None else numbers
        for name, values in (("indices", indices), ("caption_lengths", caption_lengths)):
            if values is not None and values.shape != (len(condition),):
                raise ValueError(
                    f"{name} must have shape ({len(condition)},), one for each condition, not {tuple(values.shape)}"
                )
        for start in range(0, max(len(condition), 1), size):  # a batch is decoded while the next one is drawn
            rows = slice(start, start + size)
            lengths = None if caption_lengths is None else caption_lengths[rows]
            drawn, check = self.sampler.unchecked(
                condition[rows], config, caption_lengths=lengths, seed=seed, indices=indices[rows]
            )
            side = isqrt(drawn.shape[1])
            images.append(self.pixels(drawn.unflatten(1, (side, side))))
            check()  # waits for the codes, while a GPU decodes them
            codes.append(drawn)
        return Images.together(images), torch.cat(codes)
