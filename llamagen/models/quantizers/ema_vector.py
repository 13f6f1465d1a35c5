"""A codebook whose entries are averages of their latents (arXiv 1711.00937, appendix A.1). B batch, E channels, h × w
grid, K codes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from llamagen.distributed.across_ranks import sum_over_ranks
from llamagen.models.quantizer import Quantized
from llamagen.models.vector_quantizer import VectorQuantizer

MIN_NORM = 1e-12
"""Norm of a sum below which it has no direction."""


class EMAVectorQuantizer(VectorQuantizer):
    """Vector quantisation with entries that follow their latents by an average, instead of a codebook loss.

    In each step the latents of entry i are summed over all batches and ranks, and

        sums_i ← decay · sums_i + (1 − decay) · Σ latents,    entry_i ← sums_i / |sums_i|.

    The paper divides the sums by equal averages of the counts. Entries and latents are l2-normalised, so the division
    does not change them, and neither counts nor their smoothing are needed. An entry without latents in a step stays as
    it is. ``latent_sums`` starts as the initial entries, which then weigh as much as one latent in each step.

    Args:
        codebook_size: number of entries K.
        codebook_dim: width of an entry E.
        decay: weight of the old average in each step.

    Raises:
        ValueError: in one line, if ``decay`` is not a number of at least 0 and below 1.
    """

    latent_sums: Tensor

    def __init__(self, codebook_size: int, codebook_dim: int, decay: float = 0.99) -> None:
        # A configuration can hold a string or a boolean here: the types of a quantiser's arguments are not checked.
        is_number = isinstance(decay, int | float) and not isinstance(decay, bool)
        if not is_number or not 0.0 <= decay < 1.0:
            raise ValueError(f"decay of EMAVectorQuantizer is {decay!r}; it must be a number of at least 0 and below 1")
        super().__init__(codebook_size, codebook_dim)
        self.decay = decay
        self.register_buffer("latent_sums", self.embedding.weight.detach().clone())
        # footgun: not a buffer. DDP overwrites buffers with those of the first rank at each forward pass.
        self._pending: Tensor | None = None

    def codebook(self) -> Tensor:
        """The l2-normalised entries, (K, E) float32, without a gradient."""
        return super().codebook().detach()

    @property
    def loss_names(self) -> tuple[str, ...]:
        """``commitment``, and ``entropy`` if its weight is above 0."""
        return tuple(name for name in super().loss_names if name != "codebook")

    def forward(self, latent: Tensor) -> Quantized:
        """Quantise, in float32 even under autocast, and in training keep what :meth:`after_step` needs.

        Args:
            latent: (B, E, h, w).
        """
        encoding = super().forward(latent)
        losses = {name: encoding.losses[name] for name in self.loss_names}
        if self.training:
            self._collect(encoding.latent.detach(), encoding.codes)
        # footgun: entries need a gradient, of zeros, so that the optimizer holds them. Their weights' average (EMA),
        # which belongs to that of encoder and decoder, is in its state, and DDP waits for each parameter's gradient.
        losses["commitment"] = losses["commitment"] + 0.0 * self.embedding.weight[0, 0]
        return encoding._replace(losses=losses)

    def _collect(self, latent: Tensor, codes: Tensor) -> None:
        """Add the sums of latents (B, E, h, w) by code, and their counts, to those of the step: (K, E + 1)."""
        vectors = F.pad(latent.movedim(1, -1).reshape(-1, self.dim), (0, 1), value=1.0)
        # The sums by code, as the gradient of a lookup: unlike those of index_add_, they are deterministic on GPUs.
        sums = torch.ops.aten.embedding_dense_backward(vectors, codes.flatten(), self.size, -1, False)
        self._pending = sums if self._pending is None else self._pending + sums

    def before_step(self) -> None:
        """Drop the latents of a step that the optimizer has skipped."""
        self._pending = None

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the entries; all ranks must call it together."""
        if self._pending is None:  # in evaluation mode, because it is frozen
            return
        total = sum_over_ranks(self._pending)
        self._pending = None
        self.latent_sums.mul_(self.decay).add_(total[:, :-1], alpha=1.0 - self.decay)
        moves = (total[:, -1:] > 0) & (self.latent_sums.norm(dim=-1, keepdim=True) > MIN_NORM)
        weight = self.embedding.weight
        weight.copy_(torch.where(moves, F.normalize(self.latent_sums, dim=-1), weight))

    @torch.no_grad()
    def move_codes(self, codes: Tensor, latents: Tensor) -> None:
        """Move codes (n,) to latents (n, E), which are l2-normalised, and begin their averages there."""
        super().move_codes(codes, latents)
        self.latent_sums[codes] = self.embedding.weight[codes].to(self.latent_sums.dtype)
