"""Lookup-free quantisation (MAGVIT-v2, arXiv 2310.05737, section 3.1). B batch, E bits, h × w grid."""

from collections.abc import Mapping

import torch
from torch import Tensor

from llamagen.distributed.across_ranks import mean_over_ranks
from llamagen.losses import commitment_loss, factorized_entropy_loss
from llamagen.models.quantizer import Quantized, Quantizer
from llamagen.option_checks import check_integer


class LFQ(Quantizer):
    """Replaces each channel by its sign.

    A code is the number whose bits are the signs, the first channel least significant, so there are 2 ** E codes.

    There is no codebook to learn. An entropy loss, which needs ``loss.entropy_weight`` above 0, makes the signs of a
    position certain and all codes equally frequent.

    Args:
        bits: number of channels; 9 for 512 codes, 18 for 262,144.
    """

    powers: Tensor
    residual_scale = 0.5

    def __init__(self, bits: int) -> None:
        check_integer("bits of LFQ", bits, maximum=18)
        super().__init__(2**bits, bits)
        self.register_buffer("powers", 2 ** torch.arange(bits)[:, None, None], persistent=False)
        self._has_entropy_loss = False

    @property
    def loss_names(self) -> tuple[str, ...]:
        """``commitment``, and ``entropy`` if its weight is above 0."""
        return ("commitment", "entropy") if self._has_entropy_loss else ("commitment",)

    def set_loss_weights(self, weights: Mapping[str, float]) -> None:
        """Compute the entropy loss only if its weight is above 0."""
        self._has_entropy_loss = weights.get("entropy", 0.0) > 0

    def forward(self, latent: Tensor) -> Quantized:
        """Quantise, in float32 even under autocast.

        Args:
            latent: (B, E, h, w).

        Returns:
            Signs, codes, latent and losses. In training the entropy loss takes its mean over the ranks of a
            distributed run, so all of them must take part.
        """
        with torch.autocast(latent.device.type, enabled=False):
            latent = latent.float()
            bits = latent > 0
            codes = (bits * self.powers).sum(1)
            signs = bits.float() * 2 - 1
            quantized = latent + (signs - latent).detach()
            losses = {"commitment": commitment_loss(signs, latent)}
            if self._has_entropy_loss:
                # In evaluation, ranks may have different numbers of batches, so none may wait for another.
                losses["entropy"] = factorized_entropy_loss(latent, mean_over_ranks if self.training else None)
            return Quantized(quantized, codes, latent, losses)

    def lookup(self, codes: Tensor) -> Tensor:
        """Signs of codes: (B, h, w) int64 → (B, E, h, w) float32, −1 or 1."""
        return (codes[:, None] // self.powers % 2).float() * 2 - 1
