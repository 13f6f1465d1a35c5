"""Dead codes come back to life. B batch, E codebook width, h × w grid, K codes."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from llamagen.checkpoints.weights import EMA_STATE
from llamagen.metrics import CodebookUsage
from llamagen.models.quantizer import VectorQuantizer
from llamagen.models.vqgan import Encoding


class CodeRevival(nn.Module):
    """Moves codes that nothing was near to for a while to where latents are.

    A code that is never the nearest gets no gradient and stays dead. Every so many steps the codes that no rank used
    since the last time become latents of the current batch, drawn at random on the first rank; their moments in the
    optimizer are forgotten, and their average becomes the new value.

    Args:
        codebook_size: number of codes K.
        every: optimizer steps between two revivals.
    """

    def __init__(self, codebook_size: int, every: int) -> None:
        super().__init__()
        self.every = every
        self.usage = CodebookUsage(codebook_size)
        self._latents: Tensor | None = None

    def see(self, encoding: Encoding) -> None:
        """Count the codes of a batch and keep its latents."""
        self.usage.update(encoding.codes)
        self._latents = encoding.latent.detach().movedim(1, -1).flatten(0, -2)

    def is_due(self, optimizer: Optimizer, quantizer: VectorQuantizer) -> bool:
        """Whether ``every`` steps have passed, asked after a step that the optimizer really took."""
        return int(optimizer.state[quantizer.embedding.weight]["step"]) % self.every == 0

    @torch.no_grad()
    def revive(self, quantizer: VectorQuantizer, optimizer: Optimizer, strategy: Any) -> int:
        """Give dead codes new places; all ranks call it together.

        Args:
            quantizer: whose codebook.
            optimizer: that trains it.
            strategy: Lightning's, which broadcasts the places.

        Returns:
            Number of codes that were moved.
        """
        assert self._latents is not None
        dead = (self.usage.compute().counts == 0).nonzero().flatten()
        self.usage.reset()
        drawn = self._latents[torch.randperm(len(self._latents), device=self._latents.device)[: len(dead)]]
        entries = F.normalize(strategy.broadcast(drawn).to(dead.device), dim=-1)
        dead = dead[: len(entries)]
        weight = quantizer.embedding.weight
        weight[dead] = entries.to(weight.dtype)
        for name, value in optimizer.state[weight].items():
            if torch.is_tensor(value) and value.shape == weight.shape:
                value[dead] = weight[dead] if name == EMA_STATE else 0.0
        return len(dead)
