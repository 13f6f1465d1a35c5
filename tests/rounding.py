"""A quantiser like a user's own: it rounds each channel to a grid (finite scalar quantisation, arXiv 2309.15505).

No code in ``llamagen`` or ``lightning_modules`` refers to it. B batch, E channels, h × w grid, L levels of a channel.
"""

import torch
from torch import Tensor

from llamagen.models.quantizer import Quantized, Quantizer


class Rounding(Quantizer):
    """Rounds each channel of ``tanh(latent)`` to one of L values from -1 to 1; a code is a number in base L.

    Args:
        levels: values of a channel L.
        dim: channels E; there are L ** E codes.
        scale: weight of the loss, which pulls latents to the grid.
    """

    powers: Tensor

    def __init__(self, levels: int, dim: int = 2, scale: float = 0.1) -> None:
        super().__init__(size=levels**dim, dim=dim)
        self.levels = levels
        self.scale = scale
        self.register_buffer("powers", levels ** torch.arange(dim), persistent=False)

    @property
    def loss_names(self) -> tuple[str, ...]:
        """One loss, which is scaled here."""
        return ("rounding",)

    def forward(self, latent: Tensor) -> Quantized:
        """Round a latent (B, E, h, w), with straight-through gradients."""
        with torch.autocast(latent.device.type, enabled=False):
            latent = latent.float().tanh()
            digits = ((latent + 1) / 2 * (self.levels - 1)).round().nan_to_num(0)
            rounded = digits * 2 / (self.levels - 1) - 1
            codes = (digits.long() * self.powers[:, None, None]).sum(1)
            quantized = latent + (rounded - latent).detach()
            loss = self.scale * (latent - rounded.detach()).square().mean()
            return Quantized(quantized, codes, latent, {"rounding": loss})

    def lookup(self, codes: Tensor) -> Tensor:
        """Grid points of codes: (B, h, w) → (B, E, h, w)."""
        digits = codes[:, None] // self.powers[:, None, None] % self.levels
        return digits.float() * 2 / (self.levels - 1) - 1
