"""Residual quantisation (arXiv 2203.01941, section 3.1.2).

B batch, E channels, h × w grid, K codes of a level, D levels.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llamagen.finite import not_finite
from llamagen.models.quantizer import Quantized, Quantizer, build_quantizer, check_quantizer_spec
from llamagen.option_checks import check_integer, option_named


class Residual(Quantizer):
    """Applies a quantiser several times, each time to what the levels before have left. Each level has its own codes.

    A code is the number whose digits are the codes of the levels, the first level most significant; so there are
    K ** D codes. An autoregressive model predicts the levels in this order with ``net.code_factors``.

    Args:
        level: class path of the quantiser of a level.
        level_args: its arguments. (Not ``class_path`` and ``init_args``: the command line would build an object.)
        depth: number of levels D, 2 to 18.

    Raises:
        ValueError: in one line, if the quantiser cannot be built.
    """

    def __init__(self, level: str, level_args: Mapping[str, Any], depth: int = 2) -> None:
        check_integer("depth of Residual", depth, 2, 18)
        with option_named("level of Residual"):
            spec = check_quantizer_spec({"class_path": level, "init_args": level_args})
            first = build_quantizer(spec)
        super().__init__(first.size**depth, first.dim)
        self.levels = nn.ModuleList([first, *(build_quantizer(spec) for _ in range(depth - 1))])
        self.straight_through = first.straight_through

    def _levels(self) -> list[Quantizer]:
        return [level for level in self.levels if isinstance(level, Quantizer)]

    @property
    def loss_names(self) -> tuple[str, ...]:
        """Those of a level."""
        return self._levels()[0].loss_names

    def set_loss_weights(self, weights: Mapping[str, float]) -> None:
        """Pass the weights to all levels."""
        for level in self._levels():
            level.set_loss_weights(weights)

    def forward(self, latent: Tensor) -> Quantized:
        """Quantise, in float32 even under autocast.

        Args:
            latent: (B, E, h, w).

        Returns:
            Sum of the levels, codes, the first level's latent, and the mean of each loss over the levels.
        """
        with torch.autocast(latent.device.type, enabled=False):
            first, *others = self._levels()
            encoding = first(latent)
            quantized, codes, losses = encoding.quantized, encoding.codes, {k: [v] for k, v in encoding.losses.items()}
            scale: Tensor | float = 1.0
            for level in others:
                scale = scale * level.residual_scale
                residual = level.residual_input((encoding.latent - quantized.detach()) / scale)
                part = level(residual)
                values = part.quantized
                if level.straight_through:  # the gradient has passed to the latent once, through the first level
                    values = values - (part.latent - part.latent.detach())
                quantized = quantized + scale * values
                codes = codes * level.size + part.codes
                for name, value in part.losses.items():
                    losses[name].append(value)
            means = {name: torch.stack(values).mean() for name, values in losses.items()}
            return Quantized(quantized, codes, encoding.latent, means)

    def lookup(self, codes: Tensor) -> Tensor:
        """Sums of the levels' vectors: (B, h, w) int64 → (B, E, h, w) float32."""
        levels = self._levels()
        size = levels[0].size
        scale: Tensor | float = 1.0
        total = levels[0].lookup(codes // size ** (len(levels) - 1))
        for place, level in enumerate(levels[1:], 1):
            scale = scale * level.residual_scale
            total = total + scale * level.lookup(codes // size ** (len(levels) - 1 - place) % size)
        return total

    def broken_parts(self, encoding: Quantized) -> dict[str, Tensor]:
        """Those of the first level, whose latent the encoding has, and whether the sum of the levels is not finite."""
        first, *others = self._levels()
        codes = encoding.codes // first.size ** len(others)
        broken = first.broken_parts(encoding._replace(codes=codes))
        return {**broken, "the quantised latent": not_finite(encoding.quantized).any()}
