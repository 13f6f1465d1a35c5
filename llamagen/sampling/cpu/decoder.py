"""The decode loop on CPUs, with passes of compiled C++. R rows, T new tokens, V vocabulary size."""

from typing import cast

import numpy as np
import torch
from torch import Tensor

from llamagen.models.gpt import GPT
from llamagen.models.inputs import check_positions, check_targets
from llamagen.models.kv_cache import KVCache
from llamagen.sampling.cpu.step import CPUStep, Scratch
from llamagen.sampling.decode_weights import DecodeWeights
from llamagen.sampling.decoder import DecodeState, PooledCodeDecoder
from llamagen.sampling.draws import Draws
from llamagen.sampling.inputs import SamplingRequest
from llamagen.sampling.windows import Array


class CPUCodeDecoder(PooledCodeDecoder):
    """Samples codes by C++ that is compiled for the processor.

    Args:
        gpt: the model, on the CPU.
        batch_size: number of images of the largest batch.
        dtype: dtype of products and cache, float32 or bfloat16.
        int8: keep the weights as int8.

    Raises:
        ValueError: if there is no working C++ compiler, or for another dtype.
    """

    def __init__(self, gpt: GPT, batch_size: int, dtype: torch.dtype, int8: bool = False) -> None:
        super().__init__(gpt, batch_size, dtype)
        self.weights = DecodeWeights.from_gpt(gpt, dtype, int8)
        self.step = CPUStep(self.weights)

    def new_state(self, request: SamplingRequest, cache: KVCache) -> DecodeState:
        """State of a call."""
        return CPUDecodeState(self.gpt, request, cache, self.step)


class CPUDecodeState(DecodeState):
    """State of a call of :class:`CPUCodeDecoder`."""

    def __init__(self, gpt: GPT, request: SamplingRequest, cache: KVCache, step: CPUStep) -> None:
        super().__init__(gpt, request, cache)
        self._step, self._scratch = step, Scratch()
        self._seeds, self._indices = request.seeds.contiguous(), request.indices.contiguous()
        self._scales = request.config.guidance_scales(self.length)
        images = torch.arange(self.batch, device="cpu")
        self._conditional, self._unconditional = images, images + self.batch
        self._draw_scales = torch.empty(self.batch, dtype=torch.float32, device="cpu")  # of the code that is sampled
        self._draw_steps = torch.empty_like(images)
        lengths = self.caption_lengths
        self._first = None if lengths is None else (gpt.config.condition_length - lengths).int()
        self._logits = torch.empty(self.rows, 1, gpt.config.vocab_size, dtype=torch.float32, device="cpu")
        self._window_logits = self._logits.new_empty(0)  # grows as needed

    def prefill(self) -> Tensor:
        """Logits (R, V) of the first code."""
        condition, dropped = self.conditions()
        logits, targets = self._logits[:, 0], self._order(0, 1)
        if targets is None:
            targets = torch.zeros(len(condition), 1, dtype=torch.int64, device="cpu")
        # Captions are projected one at a time, so that an image's logits do not depend on the batch.
        size = len(condition) if self.gpt.config.condition == "class" else 1
        with torch.autocast("cpu", enabled=False):
            for row in range(0, len(condition), size):
                rows = slice(row, row + size)
                x = self.gpt.cls_embedding(condition[rows], dropped[rows])
                adaptive = None
                if self.cache.adaptive is not None:
                    adaptive = self.cache.adaptive[:, rows]
                    self._write_adaptive_vectors(adaptive, condition, dropped)
                target = self.gpt.target_embedding(targets[rows])
                if target is not None:  # the last token of the condition predicts the first code
                    x = torch.cat([x[:, :-1], x[:, -1:] + target], dim=1)
                x = x.float().contiguous()
                cache = KVCache(self.cache.keys[:, rows], self.cache.values[:, rows], adaptive=adaptive)
                self._step(x, cache, None if self._first is None else self._first[rows], logits[rows], self._scratch)
        self.cache.advance(self.gpt.config.condition_length)
        return logits

    def _write_adaptive_vectors(self, vectors: Tensor, labels: Tensor, dropped: Tensor) -> None:
        """Write the vectors (6 N + 2, R, D) of the adaptive norms for the labels (R,) of rows.

        Each class is computed once and by itself, so that an image's logits do not depend on the batch.
        """
        labels = torch.where(dropped, self.gpt.config.num_classes, labels)
        for label in labels.unique():
            embedding = self.gpt.cls_embedding(label[None])[:, 0]
            vectors[:, labels == label] = cast(Tensor, self.gpt.all_adaptive_vectors(embedding)).float()

    def _embed(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Embed codes (R, T), and for a target-aware model the positions that they predict, by default the next T."""
        x = cast(Tensor, self.gpt.tok_embeddings(tokens))
        if self.gpt.target_embeddings is not None:
            if targets is None:
                first = self.cache.length - self.condition_length + 1
                targets = torch.arange(first, first + tokens.shape[1], device="cpu")
            x = x + self.gpt.target_embeddings(targets)
        return x.float().contiguous()

    def decode(self, tokens: Tensor, positions: Tensor | None = None, targets: Tensor | None = None) -> Tensor:
        """(R, T) → logits (R, T, V)."""
        check_targets(self.gpt.config.target_aware, positions, targets)
        if targets is not None:
            targets = check_positions(targets, tokens, self.gpt.config.block_size, "targets")
        x = self._embed(tokens, targets)
        rope_rows = None if positions is None else self._rope_rows(positions, tokens)
        rows, count = tokens.shape
        logits = self._logits[:rows] if count == 1 else self._logits.new_empty(rows, count, self._logits.shape[2])
        self._step(x, self.cache, self._first, logits, self._scratch, rope_rows)
        return logits

    def read(self, tokens: Tensor, positions: Tensor | None = None, targets: Tensor | None = None) -> None:
        """Read codes (R, T)."""
        x = self._embed(tokens, targets)
        rope_rows = None if positions is None else self._rope_rows(positions, tokens)
        # A pass computes the logits after its last token anyway; nothing reads them.
        self._step(x, self.cache, self._first, self._logits[: len(tokens), 0], self._scratch, rope_rows)

    def start_windows(self) -> None:
        """Nothing to do: only cached tokens of a row are read."""

    def move_row(self, source: int, target: int) -> None:
        """Nothing to do: a pass names the rows of the cache."""

    def read_windows(self, tokens: Array, rows: list[int], starts: Array) -> Tensor:
        """(R, T) → logits (R, T, V)."""
        targets = starts[:, None] - self.condition_length + 1 + np.arange(tokens.shape[1])  # (R, T)
        x = self._embed(torch.from_numpy(tokens), torch.from_numpy(targets))
        size = tokens.size * self._logits.shape[2]
        if self._window_logits.numel() < size:
            self._window_logits = self._logits.new_empty(size)
        logits = self._window_logits[:size].view(*tokens.shape, -1)
        places = torch.tensor(rows, dtype=torch.int32, device="cpu")
        first = None if self._first is None else self._first[places]
        self._step(
            x,
            self.cache,
            first,
            logits,
            self._scratch,
            cache_rows=places,
            starts=torch.from_numpy(starts.astype(np.int32)),
        )
        return logits

    def sample(self, logits: Tensor, step: int) -> None:
        """Sample code ``step`` from logits (R, V)."""
        unconditional = self._unconditional if logits.shape[0] > self.batch else self._conditional
        scales, steps = self._draw_scales.fill_(self._scales[step]), self._draw_steps.fill_(step)
        draws = Draws(self._conditional, unconditional, scales, self._seeds, self._indices, steps)
        self.codes[:, step], broken = self.draw(logits, draws)
        self.broken |= broken

    def draw(self, logits: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Draw N codes."""
        return self._step.sample_codes(logits, self.request.config, draws, self._scratch)

    def _rope_rows(self, positions: Tensor, tokens: Tensor) -> Tensor:
        config = self.gpt.config
        positions = check_positions(positions, tokens, config.block_size).expand(tokens.shape)
        return (config.condition_length + positions).int().contiguous()
