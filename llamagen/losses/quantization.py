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
