"""Condition → codes in one call."""

from torch import Tensor

from llamagen.models.gpt import GPT
from llamagen.sampling.config import SamplingConfig
from llamagen.sampling.sampler import Sampler


def generate(
    gpt: GPT,
    condition: Tensor,
    config: SamplingConfig | None = None,
    *,
    caption_lengths: Tensor | None = None,
    seed: int = 0,
    indices: Tensor | None = None,
) -> Tensor:
    """Draw the codes of one picture for each condition, all together, by a :class:`Sampler` for this call alone.

    Args:
        gpt: the model.
        condition: (B,) int64 labels, or (B, C, caption_dim) caption features padded on the left.
        config: how to draw; the model's own distribution by default.
        caption_lengths: (B,) int64, how many of the last caption positions are real; all, if not given.
        seed: seed of the run.
        indices: (B,) int64, number of each sample within the run; 0 … B − 1, if not given.

    Returns:
        (B, L) int64 codes in raster order, L = ``block_size``.

    Raises:
        ValueError: as :class:`Sampler` does.
        FloatingPointError: if some logits are not finite.
    """
    sampler = Sampler(gpt, max(len(condition), 1))
    return sampler(condition, config, caption_lengths=caption_lengths, seed=seed, indices=indices)
