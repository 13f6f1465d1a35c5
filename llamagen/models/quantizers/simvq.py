"""SimVQ: a learned linear map of frozen codes (arXiv 2411.02038). B batch, E channels, h × w grid, K codes."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamagen.losses import codebook_loss, commitment_loss
from llamagen.models.quantizer import Quantized, Quantizer
from llamagen.models.vector_quantizer import nearest_codes


class SimVQ(Quantizer):
    """Vector quantisation with the codebook ``frozen codes · linear map``.

    Each step moves the linear map and so all codes, also those that no latent is near to. So few codes die, even
    with 262,144 of them.

    Args:
        codebook_size: number of codes K.
        codebook_dim: channels E.
    """

    frozen_codes: Tensor

    def __init__(self, codebook_size: int, codebook_dim: int) -> None:
        super().__init__(codebook_size, codebook_dim)
        self.register_buffer("frozen_codes", torch.empty(codebook_size, codebook_dim))
        self.projection = nn.Linear(codebook_dim, codebook_dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the frozen codes from a normal distribution of norm about 1, and make the linear map orthogonal."""
        nn.init.normal_(self.frozen_codes, std=self.dim**-0.5)
        nn.init.orthogonal_(self.projection.weight)

    @property
    def loss_names(self) -> tuple[str, ...]:
        """``codebook``, which trains the linear map, and ``commitment``."""
        return ("codebook", "commitment")

    def codebook(self) -> Tensor:
        """The mapped codes, (K, E) float32."""
        return self.frozen_codes.float() @ self.projection.weight.float().T

    def forward(self, latent: Tensor) -> Quantized:
        """Replace each vector by the nearest mapped code, in float32 even under autocast.

        Args:
            latent: (B, E, h, w).
        """
        with torch.autocast(latent.device.type, enabled=False):
            latent = latent.float()
            with torch.no_grad():
                codebook = self.codebook()
                codes = nearest_codes(latent, codebook, normalized=False)
            # Only the chosen codes are mapped with a gradient.
            entries = self._map(codes)
            quantized = latent + (entries - latent).detach()
            losses = {"codebook": codebook_loss(entries, latent), "commitment": commitment_loss(entries, latent)}
            return Quantized(quantized, codes, latent, losses)

    def _map(self, codes: Tensor) -> Tensor:
        chosen = F.embedding(codes, self.frozen_codes).float()
        return (chosen @ self.projection.weight.float().T).movedim(-1, 1)

    def lookup(self, codes: Tensor) -> Tensor:
        """Mapped codes: (B, h, w) int64 → (B, E, h, w) float32."""
        with torch.autocast(codes.device.type, enabled=False):
            return self._map(codes)
