"""Sampling of codes by calls of the model, on any device.

A model with ``code_factors`` has two heads in sequence, and the second one needs what was drawn from the first. So its
passes return hidden states instead of logits, and :func:`~llamagen.sampling.draws.next_factorized_code` draws from
them.

Shapes: B images, R rows, T new tokens, V vocabulary size; with ``code_factors``, V in shapes of passes and draws is the
width of the model.
"""

from typing import cast

import torch
from torch import Tensor

from llamagen.finite import not_finite
from llamagen.models.gpt import GPT
from llamagen.models.kv_cache import KVCache
from llamagen.sampling.decoder import DecodeState, PooledCodeDecoder
from llamagen.sampling.draws import Draws, next_code, next_factorized_code
from llamagen.sampling.inputs import SamplingRequest
from llamagen.sampling.noise import code_counters
from llamagen.sampling.windows import Array


class EagerCodeDecoder(PooledCodeDecoder):
    """Samples codes by calls of the model, on any device."""

    def new_state(self, request: SamplingRequest, cache: KVCache) -> DecodeState:
        """State of a call."""
        return EagerDecodeState(self.gpt, request, cache)


class EagerDecodeState(DecodeState):
    """State of a call of :class:`EagerCodeDecoder`."""

    def __init__(self, gpt: GPT, request: SamplingRequest, cache: KVCache) -> None:
        super().__init__(gpt, request, cache)
        device = self.codes.device
        factors = gpt.config.code_factors
        self._counters = code_counters(gpt.config.vocab_size if factors is None else sum(factors), device)
        self._pass = gpt if factors is None else gpt.features
        self._steps = torch.arange(self.length, device=device)
        scales = request.config.guidance_scales(self.length)
        self._scales = torch.tensor(scales, dtype=torch.float32, device=device)

    def prefill(self) -> Tensor:
        """Logits (R, V) of the first code."""
        condition, dropped = self.conditions()
        logits = self._pass(
            None,
            condition,
            caption_lengths=self.caption_lengths,
            drop_condition=dropped,
            cache=self.cache,
            targets=self._order(0, 1),
        )
        return cast(Tensor, logits[:, -1])

    def decode(self, tokens: Tensor, positions: Tensor | None = None, targets: Tensor | None = None) -> Tensor:
        """(R, T) → logits (R, T, V)."""
        logits = self._pass(
            tokens, caption_lengths=self.caption_lengths, cache=self.cache, positions=positions, targets=targets
        )
        return cast(Tensor, logits)

    def read(self, tokens: Tensor, positions: Tensor | None = None, targets: Tensor | None = None) -> None:
        """Read codes (R, T)."""
        self.gpt.features(
            tokens, caption_lengths=self.caption_lengths, cache=self.cache, positions=positions, targets=targets
        )

    def sample(self, logits: Tensor, step: int) -> None:
        """Sample code ``step`` from logits (R, V)."""
        request = self.request
        self.codes[:, step], broken = self._next_code(
            logits, self._scales[step], request.seeds, request.indices, self._steps[step]
        )
        self.broken |= broken

    def start_windows(self) -> None:
        """Clear the cache after the condition: masked entries must be finite, whatever earlier calls have left."""
        self.cache.keys[..., self.cache.length :, :] = 0
        self.cache.values[..., self.cache.length :, :] = 0

    def move_row(self, source: int, target: int) -> None:
        """Move a row of the cache, so that the rows of a pass come first."""
        self.cache.keys[:, target] = self.cache.keys[:, source]
        self.cache.values[:, target] = self.cache.values[:, source]
        if self.cache.adaptive is not None:
            self.cache.adaptive[:, target] = self.cache.adaptive[:, source]

    def read_windows(self, tokens: Array, rows: list[int], starts: Array) -> Tensor:
        """(R, T) → logits (R, T, V)."""
        logits = self._read_at(tokens, rows, starts)
        if not_finite(logits).any():
            # footgun: masked attention to a guess whose values are not finite is NaN, since 0 · NaN is NaN. So forget
            # the guesses, and read them one by one: then no token attends to memory of the later ones.
            for row, start in enumerate(starts.tolist()):
                self.cache.keys[:, row, :, start:] = 0
                self.cache.values[:, row, :, start:] = 0
            parts = [self._read_at(tokens[:, i : i + 1], rows, starts + i) for i in range(tokens.shape[1])]
            logits = torch.cat(parts, dim=1)
        return logits

    def _read_at(self, tokens: Array, rows: list[int], starts: Array) -> Tensor:
        cache = self.cache.first_rows(len(rows))
        device, lengths = self.codes.device, self.request.caption_lengths
        cache.set_row_lengths(torch.from_numpy(starts).to(device), int(starts.max()))
        lengths = None if lengths is None else lengths[self._image_of(rows)]
        return cast(Tensor, self._pass(torch.from_numpy(tokens).to(device), caption_lengths=lengths, cache=cache))

    def draw(self, logits: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Draw N codes."""
        rows = draws.conditional
        if self.guided:
            rows = torch.cat([rows, draws.unconditional])
        return self._next_code(logits[rows], draws.scales[:, None], draws.seeds, draws.indices, draws.steps)

    def _next_code(
        self, logits: Tensor, scale: Tensor, seeds: Tensor, indices: Tensor, step: Tensor
    ) -> tuple[Tensor, Tensor]:
        config, counters = self.request.config, self._counters
        if self.gpt.second_factor is None:
            return next_code(logits, config, scale, seeds, indices, step, counters)
        heads = self.gpt.output, self.gpt.second_factor
        return next_factorized_code(logits, heads, config, scale, seeds, indices, step, counters)
