"""Codes of one batch, one position after the other. B images, R rows (2 B where guided), L codes, V vocabulary."""

from typing import cast

import torch
from torch import Tensor

from llamagen.finite import not_finite
from llamagen.models.gpt import GPT
from llamagen.models.kv_cache import KVCache
from llamagen.sampling.config import SamplingConfig
from llamagen.sampling.decode_weights import DecodeWeights
from llamagen.sampling.logits import draw, guide
from llamagen.sampling.noise import code_counters, gumbel, seed_tensor


class Decoder:
    """Draws codes by calls of the model, on any device.

    The cache is allocated once, for the largest batch. Conditional rows come first; when no later code is guided, the
    unconditional ones are left out.

    Args:
        gpt: the model, in evaluation mode.
        batch_size: images of the largest batch.
        dtype: of the cache.
    """

    weights: DecodeWeights | None = None  # of compiled steps
    full_batches = False  # whether each batch must have its full size

    def __init__(self, gpt: GPT, batch_size: int, dtype: torch.dtype) -> None:
        self.gpt, self.batch_size, self.dtype = gpt, batch_size, dtype
        self.device = gpt.output.weight.device
        self._memory: KVCache | None = None

    def refresh(self) -> None:
        """See changes of the model's weights in place, where copies of them are kept."""
        if self.weights is not None:
            self.weights.refresh(self.gpt)

    def __call__(
        self,
        condition: Tensor,
        config: SamplingConfig,
        caption_lengths: Tensor | None,
        seed: int,
        indices: Tensor,
    ) -> Tensor:
        """Draw the codes of a batch; arguments as in :func:`~llamagen.sampling.generate.generate`.

        Returns:
            (B, L) int64. Afterwards ``broken`` (B,) bool says, on the device, of which images some logits were not
            finite.
        """
        length, self.batch = self.gpt.config.block_size, len(condition)
        guided = config.guided_steps(length)
        dropped = torch.zeros(self.batch, dtype=torch.bool, device=self.device)
        if guided:
            condition, dropped = torch.cat([condition, condition]), torch.cat([dropped, ~dropped])
            caption_lengths = None if caption_lengths is None else torch.cat([caption_lengths, caption_lengths])
        self.cache, self.caption_lengths = self._cache(guided > 0), caption_lengths
        self.codes, self.broken = self._new_codes(), self._new_flags()
        self._begin(config, seed, indices)
        self._draw(self._prefill(condition, dropped), 0)
        for step in range(1, length):
            if step == guided:
                self.cache = self.cache.first_rows(self.batch)
                self.caption_lengths = None if caption_lengths is None else caption_lengths[: self.batch]
            self._advance(step, step < guided)
        return self.codes

    def _new_codes(self) -> Tensor:
        return torch.empty(self.batch, self.gpt.config.block_size, dtype=torch.int64, device=self.device)

    def _new_flags(self) -> Tensor:
        return torch.zeros(self.batch, dtype=torch.bool, device=self.device)

    def prepare(self, config: SamplingConfig) -> None:
        """Allocate, and compile what is compiled, before the first batch."""
        self._allocate(config.guided_steps(self.gpt.config.block_size) > 0)

    def _allocate(self, guided: bool) -> KVCache:
        rows = 2 * self.batch_size if guided else self.batch_size
        if self._memory is None or self._memory.keys.shape[1] < rows:
            self._memory = None  # before more is allocated
            self._memory = KVCache.allocate(self.gpt.config, rows, self.device, self.dtype)
        return self._memory

    def _cache(self, guided: bool) -> KVCache:
        memory = self._allocate(guided)
        memory.length = 0
        return memory.first_rows(2 * self.batch if guided else self.batch)

    def _begin(self, config: SamplingConfig, seed: int, indices: Tensor) -> None:
        self.config, self.indices = config, indices
        self.seed = seed_tensor(seed, self.device)
        self.counters = code_counters(self.gpt.config.vocab_size, self.device)
        self.steps = torch.arange(self.codes.shape[1], device=self.device)
        scales = config.guidance_scales(self.codes.shape[1])
        self.scales = torch.tensor(scales, dtype=torch.float32, device=self.device)

    def _prefill(self, condition: Tensor, dropped: Tensor) -> Tensor:
        """Logits (R, V) of the first code."""
        logits = self.gpt(
            None, condition, caption_lengths=self.caption_lengths, drop_condition=dropped, cache=self.cache
        )
        return cast(Tensor, logits[:, -1])

    def _advance(self, step: int, guided: bool) -> None:
        """From code ``step - 1`` to the next."""
        last = self.codes[:, step - 1 : step]
        tokens = torch.cat([last, last]) if guided else last
        logits = self.gpt(tokens, caption_lengths=self.caption_lengths, cache=self.cache)
        self._draw(logits[:, -1], step)

    def _draw(self, logits: Tensor, step: int) -> None:
        self.codes[:, step], broken = next_code(
            logits, self.config, self.scales[step], self.seed, self.indices, self.steps[step], self.counters
        )
        self.broken |= broken


def next_code(
    logits: Tensor,
    config: SamplingConfig,
    scale: Tensor,
    seed: Tensor,
    indices: Tensor,
    step: Tensor,
    counters: Tensor,
) -> tuple[Tensor, Tensor]:
    """Guide, if there are twice as many rows as samples, and draw.

    Args:
        logits: (R, V), any float dtype.
        config: temperature, top-k and top-p.
        scale: scalar float32 of the guidance.
        seed: scalar int64.
        indices: (B,) int64.
        step: scalar int64.
        counters: (V,) int64, see :func:`~llamagen.sampling.noise.code_counters`.

    Returns:
        Codes (B,) int64, and (B,) bool: where logits are not finite, in either branch or when they are guided. What
        top-k and top-p set to minus infinity comes later.
    """
    logits = logits.float()
    broken = not_finite(logits)
    if len(logits) > len(indices):
        logits = guide(logits, scale)
        broken = broken.view(2, -1).any(0) | not_finite(logits)
    noise = None if config.temperature == 0.0 else gumbel(seed, indices, step, counters)
    return draw(logits, config, noise), broken
