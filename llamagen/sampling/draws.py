"""Draws of codes from logits: which rows, which code of which image."""

from typing import NamedTuple

from torch import Tensor, nn

from llamagen.finite import not_finite
from llamagen.models.factorized_codes import SecondFactor, joined_codes
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


def next_factorized_code(
    hidden: Tensor,
    heads: tuple[nn.Linear, SecondFactor],
    config: SamplingConfig,
    scale: Tensor,
    seeds: Tensor,
    indices: Tensor,
    step: Tensor,
    counters: Tensor,
) -> tuple[Tensor, Tensor]:
    """Sample the two factors of a code, the second one given the first.

    Each is drawn like a code of its own, with guidance, temperature, top-k, top-p and noise. Both branches of guidance
    get the factor that was drawn.

    Args:
        hidden: (B, D) or (2 B, D), normalised hidden states.
        heads: predict V1 and V2 logits.
        config: temperature, top-k and top-p.
        scale: see :func:`next_code`, as are ``seeds``, ``indices`` and ``step``.
        seeds: see above.
        indices: see above.
        step: see above.
        counters: (V1 + V2,) int64: the first V1 are those of the first factor.

    Returns:
        See :func:`next_code`.
    """
    first_head, second = heads
    sizes = [first_head.out_features, second.output.out_features]
    first_counters, second_counters = counters.split(sizes)
    a, a_broken = next_code(first_head(hidden), config, scale, seeds, indices, step, first_counters)
    logits = second(hidden, a.repeat(len(hidden) // len(a)))
    b, b_broken = next_code(logits, config, scale, seeds, indices, step, second_counters)
    return joined_codes(a, b, sizes[1]), a_broken | b_broken


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
