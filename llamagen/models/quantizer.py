"""Vector quantisation with an l2-normalised codebook (arXiv 2406.06525, section 2.1)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PUBLISHED_USAGE_WINDOW = 65536
MAX_SIMILARITIES = 1 << 25
"""Numbers in the largest block of similarities: 128 MiB."""
MAX_SIMILARITIES_ON_CPU = 1 << 18
"""The same on a CPU: 1 MiB, which stays in its cache."""


class Quantized(NamedTuple):
    """What quantising a latent gives; B batch, E codebook width, h × w grid.

    Attributes:
        quantized: (B, E, h, w), the chosen entries; gradients pass straight through to ``latent``.
        codes: (B, h, w) int64.
        latent: (B, E, h, w), the l2-normalised latent.
        entries: (B, E, h, w), the chosen l2-normalised entries; gradients reach the codebook.
    """

    quantized: Tensor
    codes: Tensor
    latent: Tensor
    entries: Tensor


class VectorQuantizer(nn.Module):
    """Replace each vector of a grid by the nearest entry of a codebook, both on the unit sphere.

    Args:
        codebook_size: number of entries K.
        codebook_dim: width of an entry E.
    """

    codebook_used: Tensor

    def __init__(self, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, codebook_dim)
        # Published state dicts carry this window of recent codes; it is kept so that they load strictly. Usage is
        # counted by llamagen.metrics.CodebookUsage.
        self.register_buffer("codebook_used", torch.zeros(PUBLISHED_USAGE_WINDOW))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Spread the entries over the unit sphere."""
        size = self.embedding.num_embeddings
        nn.init.uniform_(self.embedding.weight, -1.0 / size, 1.0 / size)
        with torch.no_grad():
            self.embedding.weight.copy_(F.normalize(self.embedding.weight, dim=-1))

    def codebook(self) -> Tensor:
        """The l2-normalised entries, (K, E) float32."""
        return F.normalize(self.embedding.weight.float(), dim=-1)

    def forward(self, latent: Tensor) -> Quantized:
        """Quantise, in float32 also under autocast.

        Args:
            latent: (B, E, h, w).

        Returns:
            The quantised latent with all its parts, float32.
        """
        with torch.autocast(latent.device.type, enabled=False):
            latent = F.normalize(latent.float(), dim=1)
            codebook = self.codebook()
            codes = nearest_codes(latent, codebook)
            entries = F.embedding(codes, codebook).movedim(-1, 1)
            return Quantized(latent + (entries - latent).detach(), codes, latent, entries)

    def lookup(self, codes: Tensor) -> Tensor:
        """Entries of codes: (B, h, w) int64 → (B, E, h, w) float32."""
        return F.embedding(codes, self.codebook()).movedim(-1, 1)


@torch.no_grad()
def nearest_codes(latent: Tensor, codebook: Tensor) -> Tensor:
    """The entry of the codebook that is nearest to each vector; the first one among equals.

    On the unit sphere it is the one with the largest dot product. Dot products are held for one block of vectors at a
    time, never for all of them.

    Args:
        latent: (B, E, h, w), l2-normalised, float32.
        codebook: (K, E), l2-normalised, float32.

    Returns:
        Codes (B, h, w) int64.
    """
    vectors = latent.movedim(1, -1)
    most = MAX_SIMILARITIES_ON_CPU if latent.device.type == "cpu" else MAX_SIMILARITIES
    rows = max(1, most // len(codebook))
    blocks = vectors.reshape(-1, vectors.shape[-1]).split(rows)
    return torch.cat([(block @ codebook.T).argmax(dim=-1) for block in blocks]).view(vectors.shape[:-1])
