"""Revival of unused codes. B batch, E channels of the quantised latent, h × w grid, K codes."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from llamagen.checkpoints.weights import EMA_STATE
from llamagen.metrics import CodebookUsage
from llamagen.models.quantizer import Quantized, Quantizer
from llamagen.option_checks import check_integer


class CodeRevival(nn.Module):
    """Moves codes that were not used for a while to latents of the current batch.

    A code that is never the nearest gets no gradient and stays unused. Every ``every`` steps, each code that no rank
    has used since the last revival becomes a random latent of rank 0's batch. The optimizer's moments of moved codes
    are reset to 0, and their EMA is set to the new value.

    Args:
        quantizer: the quantiser whose codes are revived; it must have learned codes.
        every: optimizer steps between two revivals.

    Raises:
        ValueError: in one line, if ``every`` is not a positive integer, or the quantiser has no ``learned_codes``.
    """

    def __init__(self, quantizer: Quantizer, every: int) -> None:
        super().__init__()
        check_integer("revive_codes_every", every)
        if quantizer.learned_codes is None:
            raise ValueError(
                f"revive_codes_every is {every}, but {type(quantizer).__name__} does not support code revival; "
                "set it to 0"
            )
        self.every = every
        self.usage = CodebookUsage(quantizer.size)
        self._latents: Tensor | None = None

    def update(self, encoding: Quantized) -> None:
        """Count the codes of a batch and keep its latents."""
        self.usage.update(encoding.codes)
        self._latents = encoding.latent.detach().movedim(1, -1).flatten(0, -2)

    def is_due(self, optimizer: Optimizer, quantizer: Quantizer) -> bool:
        """Whether ``every`` steps have passed. Call it after each step of the optimizer, but not after skipped ones."""
        assert quantizer.learned_codes is not None
        return int(optimizer.state[quantizer.learned_codes]["step"]) % self.every == 0

    @torch.no_grad()
    def revive(self, quantizer: Quantizer, optimizer: Optimizer, strategy: Any) -> int:
        """Move the unused codes; all ranks must call it together.

        Args:
            quantizer: the quantiser.
            optimizer: the optimizer that trains it.
            strategy: Lightning's strategy, which broadcasts the latents.

        Returns:
            Number of moved codes.
        """
        weight = quantizer.learned_codes
        assert self._latents is not None
        assert weight is not None
        unused = (self.usage.compute().counts == 0).nonzero().flatten()
        self.usage.reset()
        chosen = self._latents[torch.randperm(len(self._latents), device=self._latents.device)[: len(unused)]]
        latents = strategy.broadcast(chosen).to(unused.device)
        moved = unused[: len(latents)]
        quantizer.move_codes(moved, latents)
        for name, value in optimizer.state[weight].items():
            if torch.is_tensor(value) and value.shape == weight.shape:
                value[moved] = weight[moved] if name == EMA_STATE else 0.0
        return len(moved)
