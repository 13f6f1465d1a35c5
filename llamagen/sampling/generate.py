"""Condition → codes in one call."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llamagen.models.gpt import GPT
from llamagen.sampling.config import SamplingConfig
from llamagen.sampling.inputs import Condition, Numbers, as_condition
from llamagen.sampling.sampler import Sampler


def generate(
    gpt: GPT,
    condition: Condition,
    config: SamplingConfig | Mapping[str, Any] | None = None,
    *,
    caption_lengths: Numbers | None = None,
    seed: int = 0,
    indices: Numbers | None = None,
) -> Tensor:
    """Draw the codes of one image for each condition, all together, by a :class:`Sampler` for this call alone.

    Args:
        gpt: the model.
        condition: (B,) labels of any whole type, or one label; or (B, C, caption_dim) caption features padded on the
            left. Tensors, arrays of numpy and lists are taken, and moved to the model's device.
        config: how to draw, or a mapping of its fields; the model's own distribution by default.
        caption_lengths: (B,), how many of the last caption positions are real; all, if not given.
        seed: seed of the run, any whole number.
        indices: (B,), number of each sample within the run; 0 … B − 1, if not given.

    Returns:
        (B, L) int64 codes in raster order, L = ``block_size``; of no conditions (0, L).

    Raises:
        ValueError: as :class:`Sampler` does.
        FloatingPointError: if some logits are not finite.
    """
    condition = as_condition(gpt, condition)
    sampler = Sampler(gpt, max(len(condition), 1))
    return sampler(condition, config, caption_lengths=caption_lengths, seed=seed, indices=indices)
