"""From logits to a code: top-k, top-p, temperature, and the draw itself. B batch, V vocabulary."""

import torch
from torch import Tensor

from llamagen.sampling.config import SamplingConfig


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Set the logits of codes that are not to be drawn to minus infinity.

    Top-k comes first; top-p then counts the probabilities of what is left. The most likely code always stays.

    Args:
        logits: (B, V) float32.
        top_k: keep the k largest, and what equals the k-th; 0 keeps all.
        top_p: keep a code if the more likely ones have at most this probability together; 1 keeps all.

    Returns:
        (B, V) float32, a new tensor where something was removed.
    """
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        removed = torch.empty_like(before, dtype=torch.bool).scatter_(-1, order, before > top_p)
        logits = logits.masked_fill(removed, -torch.inf)
    return logits


def draw(logits: Tensor, config: SamplingConfig, uniform: Tensor) -> Tensor:
    """Draw one code for each row by inverting the cumulative distribution.

    Args:
        logits: (B, V), any float dtype; computed in float32, the cumulative sum in float64.
        config: temperature, top-k and top-p.
        uniform: (B,) float64 in [0, 1), one number for each row.

    Returns:
        (B,) int64.
    """
    logits = logits.float()
    if config.temperature == 0.0:
        return logits.argmax(dim=-1)
    # With the largest logit at 0 no temperature, however low, makes a logit overflow.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / config.temperature
    logits = filter_logits(logits, config.top_k, config.top_p)
    cumulative = logits.softmax(dim=-1).double().cumsum(dim=-1)
    # The first code whose cumulative probability exceeds the target: a code of probability 0 never is.
    target = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)
