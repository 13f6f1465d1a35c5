"""Draws of codes from logits: which rows, which code of which image."""

from typing import NamedTuple

from torch import Tensor

from llamagen.finite import not_finite
from llamagen.sampling.config import SamplingConfig
from llamagen.sampling.logits import guide, sample_codes
from llamagen.sampling.noise import gumbel


class Draws(NamedTuple):
    """N codes to draw from rows of logits. A code depends on these fields and on its logits only.

    Attributes:
        conditional: (N,) int64, row of the logits of the conditional branch.
        unconditional: (N,) int64, row of the logits of the unconditional branch; equal to ``conditional`` if the draw
            is not guided.
        scales: (N,) float32, guidance scale; 1 if the draw is not guided.
        seeds: (N,) int64, seed of the image.
        indices: (N,) int64, index of the image within the run.
        steps: (N,) int64, index of the code within the image.
    """

    conditional: Tensor
    unconditional: Tensor
    scales: Tensor
    seeds: Tensor
    indices: Tensor
    steps: Tensor


def next_code(
    logits: Tensor,
    config: SamplingConfig,
    scale: Tensor,
    seeds: Tensor,
    indices: Tensor,
    step: Tensor,
    counters: Tensor,
) -> tuple[Tensor, Tensor]:
    """Guide the logits if there are two rows for each image, and sample a code. Needs no synchronization.

    Args:
        logits: (B, V) or (2 B, V), any float dtype.
        config: temperature, top-k and top-p.
        scale: guidance scale, float32, a scalar or (B, 1).
        seeds: (B,) int64.
        indices: (B,) int64.
        step: int64, index of the code, a scalar or (B,).
        counters: (V,) int64, see :func:`~llamagen.sampling.noise.code_counters`.

    Returns:
        (B,) int64 codes, and (B,) bool: whether some logits are not finite, in a branch or after guidance. This is
        checked before top-k and top-p, which set logits to minus infinity on purpose.
    """
    logits, broken = guided_logits(logits, len(indices), scale)
    noise = None if config.temperature == 0.0 else gumbel(seeds, indices, step, counters)
    return sample_codes(logits, config, noise), broken


def guided_logits(logits: Tensor, count: int, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Guide the logits if there are two rows for each of ``count`` draws.

    Args:
        logits: (N, V) or (2 N, V), any float dtype.
        count: N.
        scale: guidance scale, float32, a scalar or (N, 1).

    Returns:
        (N, V) float32, and (N,) bool: whether some logits are not finite, in a branch or after guidance.
    """
    logits = logits.float()
    broken = not_finite(logits)
    if len(logits) > count:
        logits = guide(logits, scale)
        broken = broken.view(2, -1).any(0) | not_finite(logits)
    return logits, broken
