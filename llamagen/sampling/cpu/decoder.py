"""Codes of one batch on a CPU, by compiled C++. B batch."""

import torch
from torch import Tensor

from llamagen.models.gpt import GPT
from llamagen.models.kv_cache import KVCache
from llamagen.sampling.config import SamplingConfig
from llamagen.sampling.cpu.step import CPUStep
from llamagen.sampling.decode_weights import DecodeWeights
from llamagen.sampling.decoder import Decoder


class CPUDecoder(Decoder):
    """The same by code that is compiled for the processor.

    Args:
        gpt: the model, on the CPU.
        batch_size: images B.
        dtype: of products and cache, float32 or bfloat16.
        int8: keep the weights as int8.

    Raises:
        ValueError: if it cannot be compiled.
    """

    def __init__(self, gpt: GPT, batch_size: int, dtype: torch.dtype, int8: bool = False) -> None:
        super().__init__(gpt, batch_size, dtype)
        self.weights = DecodeWeights.from_gpt(gpt, dtype, int8)
        self.step = CPUStep(self.weights)
        self.logits = torch.empty(0, gpt.config.vocab_size, dtype=torch.float32, device="cpu")

    def _begin(self, config: SamplingConfig, seed: int, indices: Tensor) -> None:
        self.config, self.indices, self.run_seed = config, indices.contiguous(), seed
        self.guidance = config.guidance_scales(self.codes.shape[1])
        lengths = self.caption_lengths
        self.first = None if lengths is None else (self.gpt.config.condition_length - lengths).int()
        rows = self.cache.keys.shape[1]
        if len(self.logits) < rows:
            self.logits = self.logits.new_empty(rows, self.gpt.config.vocab_size)

    def _prefill(self, condition: Tensor, dropped: Tensor) -> Tensor:
        # Captions are projected a sample at a time, so that a sample's numbers are the same in any batch.
        together = len(condition) if self.gpt.config.condition == "class" else 1
        with torch.autocast("cpu", enabled=False):
            for row in range(0, len(condition), together):
                rows = slice(row, row + together)
                x = self.gpt.cls_embedding(condition[rows], dropped[rows]).float().contiguous()
                cache = KVCache(self.cache.keys[:, rows], self.cache.values[:, rows])
                self.step(x, cache, None if self.first is None else self.first[rows], self.logits[rows])
        self.cache.advance(self.gpt.config.condition_length)
        return self.logits[: len(condition)]

    def _advance(self, step: int, guided: bool) -> None:
        last = self.codes[:, step - 1]
        x = self.gpt.tok_embeddings(torch.cat([last, last]) if guided else last)[:, None].float()
        logits = self.logits[: len(x)]
        self.step(x.contiguous(), self.cache, self.first, logits)
        self._draw(logits, step)

    def _draw(self, logits: Tensor, step: int) -> None:
        self.step.draw(
            logits, self.config, self.guidance[step], self.run_seed, self.indices, step, self.codes, self.broken
        )
