"""Condition → codes → pixels."""

from math import isqrt

from torch import Tensor

from llamagen.models.gpt import GPT
from llamagen.models.vqgan import VQGAN
from llamagen.sampling.config import SamplingConfig
from llamagen.sampling.pixels import Pictures, PixelDecoder
from llamagen.sampling.sampler import Sampler, compute_dtype


class PictureSampler:
    """Draws pictures, in batches, with memory that serves many calls.

    Args:
        gpt: draws the codes.
        tokenizer: turns them into pixels; on the GPT's device afterwards.
        batch_size: see :class:`~llamagen.sampling.sampler.Sampler`.
        compiled: see there.
        int8: see there.

    Raises:
        ValueError: see there.
    """

    def __init__(
        self, gpt: GPT, tokenizer: VQGAN, batch_size: int, *, compiled: bool = False, int8: bool = False
    ) -> None:
        self.sampler = Sampler(gpt, batch_size, compiled=compiled, int8=int8)
        self.pixels = PixelDecoder(tokenizer, gpt.output.weight.device, compute_dtype(gpt))

    def prepare(self, config: SamplingConfig) -> None:
        """Allocate and compile for calls with these settings, before the first."""
        self.sampler.prepare(config)

    def __call__(
        self,
        condition: Tensor,
        config: SamplingConfig,
        *,
        caption_lengths: Tensor | None = None,
        seed: int = 0,
        indices: Tensor | None = None,
    ) -> tuple[Pictures, Tensor]:
        """Draw a picture for each condition; arguments and errors are those of a ``Sampler``.

        Returns:
            N pictures and their codes (N, L) int64. A GPU may still be working on the pictures when the next call
            begins.
        """
        codes = self.sampler(condition, config, caption_lengths=caption_lengths, seed=seed, indices=indices)
        side = isqrt(codes.shape[1])
        return self.pixels(codes.unflatten(1, (side, side))), codes
