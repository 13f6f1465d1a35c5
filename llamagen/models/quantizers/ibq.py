"""Index backpropagation quantisation (IBQ, arXiv 2412.02692). B batch, E channels, h × w grid, K codes."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llamagen.distributed.across_ranks import mean_over_ranks
from llamagen.losses import codebook_loss, commitment_loss, negative_entropy
from llamagen.models.quantizer import Quantized
from llamagen.models.vector_quantizer import VectorQuantizer

TEMPERATURE = 0.05
"""Divides the cosine of the angle between latent and code."""
BLOCK = 1 << 25
"""Number of probabilities computed at a time, at least: 128 MiB in float32."""
BLOCK_ON_CPU = 1 << 23
"""The same on a CPU: 32 MiB, from which on the C library returns freed memory. Smaller blocks fragment the heap."""


class IBQ(VectorQuantizer):
    """Chooses the nearest code on the unit sphere; the gradient goes through the softmax over all codes.

    The forward pass uses the chosen code, the backward pass the gradient of ``softmax(cosines / 0.05) · codebook`` with
    respect to the probabilities. (The paper compares by dot products, which in short runs of narrow tokenizers ended
    with a single code; see docs/log.md.) So each step moves all codes, and few die. Probabilities are computed for one
    block of latents at a time and again in the backward pass, so they are never all in memory.

    Args:
        codebook_size: number of codes K.
        codebook_dim: channels E; 256 in the paper.
    """

    straight_through = False

    @property
    def loss_names(self) -> tuple[str, ...]:
        """``codebook``, ``commitment``, ``index``, and ``entropy`` if its weight is above 0.

        ``index`` is the squared distance of latent and quantised latent, with the gradient of the probabilities.
        """
        names = ("codebook", "commitment", "index")
        return (*names, "entropy") if self._has_entropy_loss else names

    def forward(self, latent: Tensor) -> Quantized:
        """Quantise, in float32 even under autocast.

        Args:
            latent: (B, E, h, w).

        Returns:
            Quantised latent, codes, l2-normalised latent and losses. In training the entropy loss takes its mean over
            the ranks of a distributed run, so all of them must take part.
        """
        with torch.autocast(latent.device.type, enabled=False):
            latent = F.normalize(latent.float(), dim=1)
            vectors, codebook = latent.movedim(1, -1), self.codebook()
            block = BLOCK_ON_CPU if latent.device.type == "cpu" else BLOCK
            blocks = vectors.reshape(-1, self.dim).split(-(-block // self.size))
            parts, codes_of_parts = [], []
            entropy, total = latent.new_zeros(()), latent.new_zeros(())
            for rows in blocks:
                part = Assignment(*checkpoint(assign, rows, codebook, self._has_entropy_loss, use_reentrant=False))
                parts.append(part.quantized)
                codes_of_parts.append(part.codes)
                entropy, total = entropy + part.entropy, total + part.probabilities
            codes = torch.cat(codes_of_parts).view(vectors.shape[:-1])
            quantized = torch.cat(parts).view(vectors.shape).movedim(-1, 1)
            entries = F.embedding(codes, codebook).movedim(-1, 1)
            losses = {
                "codebook": codebook_loss(entries, latent),
                "commitment": commitment_loss(entries, latent),
                "index": F.mse_loss(quantized, latent),
            }
            if self._has_entropy_loss:
                # In evaluation, ranks may have different numbers of batches, so none may wait for another.
                mean = total / codes.numel()
                mean = mean_over_ranks(mean) if self.training else mean
                losses["entropy"] = entropy / codes.numel() + negative_entropy(mean)
            return Quantized(quantized, codes, latent, losses)


class Assignment(NamedTuple):
    """Codes of a block of n vectors.

    Attributes:
        quantized: (n, E) the chosen entries, with the gradient of the probabilities.
        codes: (n,) int64.
        entropy: sum of the entropies of the probabilities, a scalar, in nats.
        probabilities: (K,) their sum over the vectors.
    """

    quantized: Tensor
    codes: Tensor
    entropy: Tensor
    probabilities: Tensor


def assign(vectors: Tensor, codebook: Tensor, with_entropy: bool) -> Assignment:
    """Choose a code for each vector of a block.

    Args:
        vectors: (n, E) float32, l2-normalised.
        codebook: (K, E) float32, l2-normalised.
        with_entropy: also compute the last two results, which are 0 and empty otherwise.
    """
    logits = vectors @ codebook.T / TEMPERATURE
    codes = logits.argmax(-1)
    if with_entropy:
        logarithms = logits.log_softmax(-1)
        probabilities = logarithms.exp()
        entropy, total = -(probabilities * logarithms).sum(), probabilities.sum(0)
    else:
        probabilities = logits.softmax(-1)
        entropy, total = logits.new_zeros(()), logits.new_zeros(0)
    # The gradient of one_hot + probabilities − probabilities.detach(), multiplied by the codebook.
    soft = probabilities @ codebook.detach()
    quantized = F.embedding(codes, codebook) + (soft - soft.detach())
    return Assignment(quantized, codes, entropy, total)
