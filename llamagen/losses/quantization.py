"""Losses of vector quantisation (arXiv 2406.06525, section 2.1). B batch, E channels, h × w grid, K codes."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

ENTROPY_TEMPERATURE = 0.01


def codebook_loss(entries: Tensor, latent: Tensor) -> Tensor:
    """Pull the chosen entries to the latents: ``mean((entries − sg(latent))²)``, both (B, E, h, w)."""
    return F.mse_loss(entries, latent.detach())


def commitment_loss(entries: Tensor, latent: Tensor) -> Tensor:
    """Pull the latents to the chosen entries: ``mean((sg(entries) − latent)²)``, both (B, E, h, w)."""
    return F.mse_loss(latent, entries.detach())


def entropy_loss(latent: Tensor, codebook: Tensor, mean_over_ranks: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Encourage confident assignments that use the entire codebook.

    With p = softmax(−squared distance / 0.01): the mean entropy of p over all positions, minus the entropy of the mean
    p. footgun: this needs a (B · h · w, K) tensor, so compute the loss only if its weight is above 0.

    Args:
        latent: (B, E, h, w), l2-normalised.
        codebook: (K, E), l2-normalised.
        mean_over_ranks: differentiable mean of a tensor over the ranks of a distributed run, for the mean p of the
            global batch.

    Returns:
        Scalar, computed in float32 even under autocast.
    """
    with torch.autocast(latent.device.type, enabled=False):
        return _entropy_loss(latent.movedim(1, -1).flatten(0, -2).float(), codebook.float(), mean_over_ranks)


def _entropy_loss(vectors: Tensor, codebook: Tensor, mean_over_ranks: Callable[[Tensor], Tensor] | None) -> Tensor:
    distance = vectors.square().sum(-1, keepdim=True) + codebook.square().sum(-1) - 2 * vectors @ codebook.T
    logits = -distance / ENTROPY_TEMPERATURE
    probabilities = logits.softmax(dim=-1)
    entropy = -(probabilities * (logits + 1e-5).log_softmax(dim=-1)).sum(-1).mean()
    mean = probabilities.mean(dim=0)
    if mean_over_ranks is not None:
        mean = mean_over_ranks(mean)
    return entropy + (mean * (mean + 1e-5).log()).sum()


def factorized_entropy_loss(latent: Tensor, mean_over_ranks: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The entropy loss of all 2 ** E combinations of signs, without a probability for each position and code.

    With p = softmax(−squared distance to the signs), which is a product over the channels: the mean entropy of p over
    all positions, a sum over the channels, minus the entropy of the mean p. The mean of p is a product of two matrices,
    the probabilities of the lower and of the upper half of the channels, so the result is exact. It takes N · 2 ** E
    multiplications for N positions, but memory for N · 2 ** (E / 2) and 2 ** E numbers only.

    Args:
        latent: (B, E, h, w).
        mean_over_ranks: differentiable mean of a tensor over the ranks of a distributed run, for the mean p of the
            global batch.

    Returns:
        Scalar in nats, computed in float32 even under autocast.
    """
    with torch.autocast(latent.device.type, enabled=False):
        logits = 4.0 * latent.movedim(1, -1).flatten(0, -2).float()  # log odds: (z + 1)² − (z − 1)² = 4 z
        positive = logits.sigmoid()
        entropy = (F.softplus(logits) - positive * logits).sum(-1).mean()
        half = positive.shape[1] // 2
        low, high = _joint(positive[:, :half]), _joint(positive[:, half:])
        mean = high.T @ low / len(low)
        if mean_over_ranks is not None:
            mean = mean_over_ranks(mean)
        return entropy + negative_entropy(mean)


def negative_entropy(probabilities: Tensor) -> Tensor:
    """``Σ p log p`` in nats, a scalar, with a finite gradient where p is 0."""
    return (probabilities * probabilities.clamp(min=1e-30).log()).sum()


def _joint(positive: Tensor) -> Tensor:
    """Probabilities of combinations of signs, (N, 2 ** n), of the probabilities (N, n) of positive ones."""
    joint = positive.new_ones(len(positive), 1)
    for each in positive.unbind(1):
        joint = torch.cat([joint * (1 - each[:, None]), joint * each[:, None]], dim=1)
    return joint
