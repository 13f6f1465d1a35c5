"""What a pass over windows reads and draws, on the device and without a wait. The functions are compiled.

B images, R rows (2 B while guided), T tokens of a row in a pass (the window), L codes of an image, N draws, D model
width, V vocabulary size.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from llamagen.finite import not_finite
from llamagen.sampling.config import SamplingConfig
from llamagen.sampling.draws import guided_logits
from llamagen.sampling.logits import limited_logits
from llamagen.sampling.noise import gumbel


class Noise(NamedTuple):
    """What the noise of a batch depends on, besides the place.

    Attributes:
        seeds: (B,) int64.
        indices: (B,) int64.
        counters: (V,) int64, see :func:`~llamagen.sampling.noise.code_counters`.
    """

    seeds: Tensor
    indices: Tensor
    counters: Tensor


def window_places(counts: Tensor, length: int, span: int) -> Tensor:
    """Places that a pass reads, (B, T): the last final code and those after it.

    At the end of an image the window moves to the left, over codes that were read before.
    """
    return (counts - 1).clamp(max=length - 1 - span)[:, None] + torch.arange(span, device=counts.device)


def read_window(
    codes: Tensor,
    counts: Tensor,
    table: Tensor,
    target_table: Tensor | None,
    span: int,
    condition_length: int,
    branches: int,
) -> tuple[Tensor, Tensor]:
    """Inputs of a pass: the last final code of each image, and guesses of those after it.

    Args:
        codes: (B, L) int64, final codes and guesses.
        counts: (B,) int64, number of final codes.
        table: (V, D) embeddings.
        target_table: (L, D) embeddings of the positions that are predicted; None unless the model is target-aware.
        span: T.
        condition_length: tokens of the condition.
        branches: 2 if guided, else 1.

    Returns:
        (R · T, D) float32, and (R,) int64: the number of cached tokens of each row.
    """
    places = window_places(counts, codes.shape[1], span)
    x = F.embedding(codes.gather(1, places).repeat(branches, 1), table)
    if target_table is not None:
        x = x + F.embedding((places + 1).repeat(branches, 1), target_table)
    return x.flatten(0, 1).float(), (condition_length + places[:, 0]).repeat(branches)


def draw(limited: Tensor, config: SamplingConfig, steps: Tensor, noise: Noise) -> Tensor:
    """Draw codes ``steps`` (B, T) of each image, (B, T) int64.

    Args:
        limited: (B, T, V) float32 limited logits, or (B, 1, V) for all codes of an image.
        config: temperature.
        steps: (B, T) int64.
        noise: of the batch.
    """
    if config.temperature == 0.0:
        return limited.argmax(-1).expand_as(steps)
    seeds, indices = (each[:, None].expand_as(steps).flatten() for each in (noise.seeds, noise.indices))
    gumbels = gumbel(seeds, indices, steps.flatten(), noise.counters).view(*steps.shape, -1)
    return (limited + gumbels).argmax(-1)


def limit(
    logits: Tensor, config: SamplingConfig, scales: Tensor, guided_steps: Tensor, steps: Tensor
) -> tuple[Tensor, Tensor]:
    """Guide logits, and limit them.

    Args:
        logits: (N, V) or (2 N, V).
        config: temperature, top-k and top-p.
        scales: (L,) float32, guidance scales.
        guided_steps: scalar int64, number of codes, from the first one, that need the unconditional branch.
        steps: N codes, int64.

    Returns:
        (N, V) float32, and (N,) bool: whether some logits are not finite.
    """
    steps = steps.flatten()
    guided, broken = guided_logits(logits, len(steps), scales[steps, None])
    if len(logits) > len(steps):
        # The unconditional branch is not used after the last guided code, so it is not checked there.
        broken = torch.where(steps < guided_steps, broken, not_finite(guided))
    return limited_logits(guided, config), broken


def settle(
    limited: Tensor,
    broken: Tensor,
    config: SamplingConfig,
    span: int,
    widest: int,
    codes: Tensor,
    counts: Tensor,
    flags: Tensor,
    noise: Noise,
) -> None:
    """Draw codes after a pass, and keep those that are final. Needs no synchronization.

    Args:
        limited: (B · T, V) float32, limited logits.
        broken: (B · T,) bool, whether some logits of a token are not finite.
        config: temperature.
        span: T.
        widest: largest window that the next pass may have. Before a pass, codes are guessed as far as it would read.
        codes: (B, L) int64, final codes and guesses; updated.
        counts: (B,) int64, number of final codes; updated.
        flags: (B,) bool, set for images with logits of final codes that are not finite.
        noise: of the batch.
    """
    batch, length = codes.shape
    offsets = torch.arange(span, device=codes.device)
    steps = window_places(counts, length, span) + 1
    limited, broken = limited.view(batch, span, -1), broken.view(batch, span)
    # 1. A draw is final if all guesses before it were right.
    old, found, new = codes.gather(1, steps), draw(limited, config, steps, noise), steps >= counts[:, None]
    last = torch.where((found != old) & new, offsets, span - 1).amin(1)
    flags.logical_or_((broken & new & (offsets <= last[:, None])).any(1))
    guessed = torch.maximum(counts - 1 + widest, steps[:, -1] + 1)  # number of codes that are final or guessed
    places = (counts - 1 + widest).clamp(max=length - span)[:, None] + offsets
    counts.copy_(steps[:, 0] + last + 1)
    result = codes.scatter(1, steps, torch.where(new, found, old))
    # 2. Guess T further codes, from the logits of the last token: at most T codes became final.
    if widest > 1:
        guesses = draw(limited[:, -1:], config, places, noise)
        guesses = torch.where(places >= guessed[:, None], guesses, result.gather(1, places))
        result = result.scatter(1, places, guesses)
    codes.copy_(result)


def limit_and_settle(
    logits: Tensor,
    scales: Tensor,
    guided_steps: Tensor,
    config: SamplingConfig,
    span: int,
    widest: int,
    codes: Tensor,
    counts: Tensor,
    flags: Tensor,
    noise: Noise,
) -> None:
    """:func:`limit` with the scales (L,) of all codes, then :func:`settle`."""
    limited, broken = limit(logits, config, scales, guided_steps, window_places(counts, codes.shape[1], span) + 1)
    settle(limited, broken, config, span, widest, codes, counts, flags, noise)
