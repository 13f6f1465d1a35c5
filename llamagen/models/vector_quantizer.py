"""Vector quantisation with an l2-normalised codebook (arXiv 2406.06525, section 2.1)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamagen.distributed.across_ranks import mean_over_ranks
from llamagen.finite import not_finite
from llamagen.losses import codebook_loss, commitment_loss, entropy_loss
from llamagen.models.quantizer import Quantized, Quantizer

PUBLISHED_USAGE_WINDOW = 65536
MAX_SIMILARITIES = 1 << 25
"""Largest number of similarities computed at a time: 128 MiB in float32."""
MAX_SIMILARITIES_ON_CPU = 1 << 18
"""The same on a CPU: 1 MiB, which fits into the processor's cache."""


class VectorQuantizer(Quantizer):
    """Replaces each vector of a grid by the nearest entry of a codebook, both on the unit sphere.

    Args:
        codebook_size: number of entries K.
        codebook_dim: width of an entry E.
    """

    codebook_used: Tensor
    residual_scale = 0.5  # of two unit vectors at an angle of 30 degrees

    def __init__(self, codebook_size: int, codebook_dim: int) -> None:
        super().__init__(codebook_size, codebook_dim)
        self.embedding = nn.Embedding(codebook_size, codebook_dim)
        # Published state dicts contain this window of recent codes. The buffer exists so that they load strictly;
        # llamagen.metrics.CodebookUsage counts the usage.
        self.register_buffer("codebook_used", torch.zeros(PUBLISHED_USAGE_WINDOW))
        self._has_entropy_loss = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the entries as random points on the unit sphere."""
        size = self.embedding.num_embeddings
        nn.init.uniform_(self.embedding.weight, -1.0 / size, 1.0 / size)
        with torch.no_grad():
            self.embedding.weight.copy_(F.normalize(self.embedding.weight, dim=-1))

    def codebook(self) -> Tensor:
        """The l2-normalised entries, (K, E) float32."""
        return F.normalize(self.embedding.weight.float(), dim=-1)

    @property
    def loss_names(self) -> tuple[str, ...]:
        """``codebook`` and ``commitment``, and ``entropy`` if its weight is above 0."""
        return ("codebook", "commitment", "entropy") if self._has_entropy_loss else ("codebook", "commitment")

    def set_loss_weights(self, weights: Mapping[str, float]) -> None:
        """Compute the entropy loss only if its weight is above 0: it needs a (B · h · w, K) tensor."""
        self._has_entropy_loss = weights.get("entropy", 0.0) > 0

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
            codebook = self.codebook()
            codes = nearest_codes(latent, codebook)
            entries = F.embedding(codes, codebook).movedim(-1, 1)
            quantized = latent + (entries - latent).detach()
            losses = {"codebook": codebook_loss(entries, latent), "commitment": commitment_loss(entries, latent)}
            if self._has_entropy_loss:
                # In evaluation, ranks may have different numbers of batches, so none may wait for another.
                # The codebook is normalised again: a shared tensor would sum, and round, gradients in another order.
                mean = mean_over_ranks if self.training else None
                losses["entropy"] = entropy_loss(latent, self.codebook(), mean)
            return Quantized(quantized, codes, latent, losses)

    def lookup(self, codes: Tensor) -> Tensor:
        """Entries of codes: (B, h, w) int64 → (B, E, h, w) float32."""
        return F.embedding(codes, self.codebook()).movedim(-1, 1)

    @property
    def learned_codes(self) -> Tensor:
        """The entries (K, E), not normalised."""
        return self.embedding.weight

    @torch.no_grad()
    def move_codes(self, codes: Tensor, latents: Tensor) -> None:
        """Move codes (n,) to latents (n, E), which are l2-normalised."""
        weight = self.embedding.weight
        weight[codes] = F.normalize(latents, dim=-1).to(weight.dtype)

    def broken_parts(self, encoding: Quantized) -> dict[str, Tensor]:
        """Whether a latent or its entry is not finite, each a scalar bool."""
        return {
            # footgun: a latent too large for float32 is normalised to 0, which is finite.
            "the encoder's latent": ~(encoding.latent.square().sum(1) > 0.5).all(),
            "the codebook's entry": not_finite(self.lookup(encoding.codes)).any(),
        }


@torch.no_grad()
def nearest_codes(latent: Tensor, codebook: Tensor, normalized: bool = True) -> Tensor:
    """Find the codebook entry nearest to each vector; the first one if several are equally near.

    On the unit sphere it is the one with the largest dot product; elsewhere half the squared norm of the entry is
    subtracted. Dot products are computed for one block of vectors at a time, so they are never all in memory.

    Args:
        latent: (B, E, h, w) float32.
        codebook: (K, E) float32.
        normalized: both are l2-normalised.

    Returns:
        Codes (B, h, w) int64.
    """
    vectors = latent.movedim(1, -1)
    limit = MAX_SIMILARITIES_ON_CPU if latent.device.type == "cpu" else MAX_SIMILARITIES
    rows = max(1, limit // len(codebook))
    blocks = vectors.reshape(-1, vectors.shape[-1]).split(rows)
    if normalized:
        codes = [(block @ codebook.T).argmax(dim=-1) for block in blocks]
    else:
        half_norms = codebook.square().sum(-1) / 2
        codes = [torch.addmm(half_norms, block, codebook.T, beta=-1).argmax(dim=-1) for block in blocks]
    return torch.cat(codes).view(vectors.shape[:-1])
