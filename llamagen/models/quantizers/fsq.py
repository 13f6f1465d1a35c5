"""Finite scalar quantisation (arXiv 2309.15505). B batch, E channels, h × w grid, K codes, l levels of a channel."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from llamagen.models.quantizer import Quantized, Quantizer
from llamagen.option_checks import check_integer

MARGIN = 1e-3
"""The bounded value can exceed the outermost levels by this share.

The paper's code has 1 − eps instead of 1 + eps, and tan instead of atanh in the shift. With 1 + eps and atanh, a latent
of 0 lies exactly on a level for every even number of levels.
"""


class FSQ(Quantizer):
    """Rounds each channel to one of a few levels. There is no codebook to learn and no loss.

    A code is the number whose digits are the levels of the channels, the first channel least significant; so there
    are as many codes as combinations of levels. The gradient passes the rounding straight through.

    Args:
        levels: number of levels of each channel, at least 3. The paper recommends at least 5 for all channels. Some of
            these have 4, to reach a power of two: ``[8, 8, 8]`` for 512 codes, ``[8, 8, 8, 8]`` for 4,096,
            ``[8, 8, 8, 8, 4]`` for 16,384, ``[8, 8, 8, 8, 4, 4]`` for 65,536, ``[8, 8, 8, 8, 8, 8]`` for 262,144.

    Raises:
        ValueError: in one line, if a number of levels is not an integer of at least 3, or there are too
            many codes.
    """

    levels: Tensor
    places: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        if not isinstance(levels, Sequence) or isinstance(levels, str) or not levels:
            raise ValueError(f"levels of FSQ is {levels!r}; give a list, the number of levels of each channel")
        for each in levels:
            check_integer("each of levels of FSQ", each)
            if each < 3:
                raise ValueError(f"levels of FSQ is {list(levels)}; each must be at least 3 (LFQ has 2 per channel)")
        super().__init__(prod(levels), len(levels))
        numbers = torch.tensor(levels)[:, None, None]
        self.register_buffer("levels", numbers, persistent=False)
        self.register_buffer("places", numbers.cumprod(0) // numbers, persistent=False)

    @property
    def _half(self) -> Tensor:
        return self.levels // 2

    def _bounds(self) -> tuple[Tensor, Tensor]:
        """Amplitude and offset of the bounded value in steps, each (E, 1, 1) float32."""
        amplitude = (self.levels.float() - 1) / 2 * (1 + MARGIN)
        return amplitude, (1 - self.levels % 2) / 2

    def forward(self, latent: Tensor) -> Quantized:
        """Bound each channel by tanh and round it, in float32 even under autocast.

        Args:
            latent: (B, E, h, w).

        Returns:
            Quantised latent with values in [-1, 1], codes, the bounded latent, and no losses.
        """
        with torch.autocast(latent.device.type, enabled=False):
            latent = latent.float()
            amplitude, offset = self._bounds()
            # With the shift, a latent of 0 lies on a level even if their number is even.
            bounded = (latent + (offset / amplitude).atanh()).tanh() * amplitude - offset
            # footgun: tanh maps an infinite latent to a finite value. The product with 0 turns it into NaN.
            bounded = bounded + 0.0 * latent
            # The margin of more than 1,001 levels exceeds half a step.
            rounded = bounded.round().clamp(-self._half, self.levels - 1 - self._half)
            codes = ((rounded.nan_to_num(0.0).long() + self._half) * self.places).sum(1)
            latent = bounded / self._half
            quantized = latent + (rounded / self._half - latent).detach()
            return Quantized(quantized, codes, latent, {})

    def lookup(self, codes: Tensor) -> Tensor:
        """Levels of codes: (B, h, w) int64 → (B, E, h, w) float32 in [-1, 1]."""
        digits = codes[:, None] // self.places % self.levels
        return (digits - self._half) / self._half.float()

    @property
    def residual_scale(self) -> Tensor:
        """One over the number of levels: rounding leaves half a step to each side, (E, 1, 1)."""
        return 1.0 / self.levels

    def residual_input(self, residual: Tensor) -> Tensor:
        """The latent that is bounded to a residual (B, E, h, w) in [-1, 1]."""
        amplitude, offset = self._bounds()
        inside = ((residual * self._half + offset) / amplitude).clamp(-1 + MARGIN, 1 - MARGIN)
        return inside.atanh() - (offset / amplitude).atanh()
