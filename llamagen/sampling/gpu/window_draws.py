"""What a pass over windows reads and draws, on the device and without a wait. The functions are compiled.

B images, R rows (2 B while guided), T tokens of a row in a pass (the window), L codes of an image, N draws, D model
width, V vocabulary size.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

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
    codes: Tensor, counts: Tensor, table: Tensor, span: int, condition_length: int, branches: int
) -> tuple[Tensor, Tensor]:
    """Inputs of a pass: the last final code of each image, and guesses of those after it.

    Args:
        codes: (B, L) int64, final codes and guesses.
        counts: (B,) int64, number of final codes.
        table: (V, D) embeddings.
        span: T.
        condition_length: tokens of the condition.
        branches: 2 if guided, else 1.

    Returns:
        (R · T, D) float32, and (R,) int64: the number of cached tokens of each row.
    """
    places = window_places(counts, codes.shape[1], span)
    x = F.embedding(codes.gather(1, places).repeat(branches, 1), table)
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


def limit(logits: Tensor, config: SamplingConfig, scales: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Guide logits (N, V) or (2 N, V) by the ``scales`` (L,) of N codes ``steps``, and limit them.

    Returns:
        (N, V) float32, and (N,) bool: whether some logits are not finite.
    """
    guided, broken = guided_logits(logits, steps.numel(), scales[steps.flatten(), None])
    return limited_logits(guided, config), broken


def settle(
    limited: Tensor,
    broken: Tensor,
    config: SamplingConfig,
    span: int,
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
    counts.copy_(steps[:, 0] + last + 1)
    result = codes.scatter(1, steps, torch.where(new, found, old))
    # 2. Guess the codes that the next pass reads and that were not drawn, from the logits of the last token.
    if span > 1:
        places = window_places(counts, length, span)
        guesses = draw(limited[:, -1:], config, places, noise)
        result = result.scatter(1, places, torch.where(places > steps[:, -1:], guesses, result.gather(1, places)))
    codes.copy_(result)


def limit_and_settle(
    logits: Tensor,
    scales: Tensor,
    config: SamplingConfig,
    span: int,
    codes: Tensor,
    counts: Tensor,
    flags: Tensor,
    noise: Noise,
) -> None:
    """:func:`limit` with the scales (L,) of all codes, then :func:`settle`."""
    limited, broken = limit(logits, config, scales, window_places(counts, codes.shape[1], span) + 1)
    settle(limited, broken, config, span, codes, counts, flags, noise)
