"""From logits to codes: guidance, temperature, top-k, top-p, and sampling. B images, V vocabulary size."""

import torch
from torch import Tensor

from llamagen.sampling.config import SamplingConfig


def guide(logits: Tensor, scale: Tensor) -> Tensor:
    """Classifier-free guidance, ``unconditional + scale · (conditional − unconditional)``.

    Args:
        logits: (2 B, V) float32, the conditional rows first.
        scale: scalar float32; at 1 the result is equal to the conditional rows, bit for bit.

    Returns:
        (B, V) float32.
    """
    conditional, unconditional = logits.chunk(2)
    return torch.where(scale == 1.0, conditional, unconditional + scale * (conditional - unconditional))


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Set the logits of codes that top-k and top-p exclude to minus infinity.

    Top-k comes first; top-p then counts the probabilities of the remaining codes. The most likely code is always kept,
    and equally likely codes are kept or excluded together. Only top-p sorts, and with top-k only the k largest.

    Args:
        logits: (B, V) float32.
        top_k: keep the k largest logits, and those equal to the k-th; 0 keeps all.
        top_p: keep a code if all more likely codes together have at most this probability; 1 keeps all.

    Returns:
        (B, V) float32; a new tensor if something was excluded.
    """
    limited, nucleus = 0 < top_k < logits.shape[-1], top_p < 1.0
    if not limited and not nucleus:
        return logits
    if limited:
        ordered = logits.topk(top_k, dim=-1, sorted=nucleus).values
    else:
        ordered = logits.sort(dim=-1, descending=True).values
    if nucleus:
        probabilities = ordered.softmax(dim=-1)
        more_likely = probabilities.cumsum(dim=-1) - probabilities
        ordered = ordered.masked_fill(more_likely > top_p, torch.inf)
    return logits.masked_fill(logits < ordered.amin(dim=-1, keepdim=True), -torch.inf)


def sample_codes(logits: Tensor, config: SamplingConfig, noise: Tensor | None) -> Tensor:
    """Sample one code for each row: the largest sum of logit and Gumbel noise (the Gumbel-max trick).

    Rounding changes the code only if two sums are almost equal. With cumulative probabilities it could change the code
    at any of thousands of boundaries.

    Args:
        logits: (B, V), any float dtype; computed in float32.
        config: temperature, top-k and top-p.
        noise: (B, V) float32, see :func:`~llamagen.sampling.noise.gumbel`; not used at temperature 0.

    Returns:
        (B,) int64.
    """
    logits = limited_logits(logits.float(), config)
    if config.temperature == 0.0:
        return logits.argmax(dim=-1)
    assert noise is not None
    return (logits + noise).argmax(dim=-1)


def limited_logits(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Logits to which the noise is added: divided by the temperature, without codes that top-k and top-p exclude.

    Args:
        logits: (B, V) float32.
        config: temperature, top-k and top-p; at temperature 0 the logits do not change.

    Returns:
        (B, V) float32.
    """
    if config.temperature == 0.0:
        return logits
    # With the largest logit at 0, dividing by a tiny temperature cannot overflow to plus infinity.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / config.temperature
    return filter_logits(logits, config.top_k, config.top_p)
