"""Condition → codes in one function call."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llamagen.models.gpt import GPT
from llamagen.sampling.config import SamplingConfig
from llamagen.sampling.inputs import Condition, Numbers, as_condition
from llamagen.sampling.sampler import OnRow, Sampler


def generate(
    gpt: GPT,
    condition: Condition,
    config: SamplingConfig | Mapping[str, Any] | None = None,
    *,
    caption_lengths: Numbers | None = None,
    seed: int | Numbers = 0,
    indices: Numbers | None = None,
    kept: Numbers | None = None,
    order: Numbers | None = None,
    on_row: OnRow | None = None,
) -> Tensor:
    """Sample the codes of one image for each condition, in one batch and without compiling.

    Arguments, result and errors are those of a call of :class:`~llamagen.sampling.sampler.Sampler`, which is the better
    choice for many calls.

    Args:
        gpt: the model.
        condition: labels or caption features.
        config: settings of sampling.
        caption_lengths: number of real caption tokens.
        seed: seed of the run, or one for each image.
        indices: index of each sample within the run.
        kept: the first codes of each image, which are not sampled.
        order: order of generation.
        on_row: called after each complete row of codes.

    Returns:
        (N, L) int64 codes in raster order, L = ``block_size``.
    """
    condition = as_condition(gpt, condition)
    sampler = Sampler(gpt, max(len(condition), 1))
    return sampler(
        condition,
        config,
        caption_lengths=caption_lengths,
        seed=seed,
        indices=indices,
        kept=kept,
        order=order,
        on_row=on_row,
    )
