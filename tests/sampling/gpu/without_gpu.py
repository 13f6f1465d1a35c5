"""The engine of GPUs without one: direct calls replace CUDA graphs, and the C++ pass replaces Triton."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llamagen.models.kv_cache import KVCache
from llamagen.sampling import SamplingConfig
from llamagen.sampling.cpu.step import CPUStep, Scratch
from llamagen.sampling.decode_weights import DecodeWeights
from llamagen.sampling.gpu import decoder as gpu
from llamagen.sampling.gpu import graphs
from llamagen.sampling.inputs import SamplingRequest
from tests.small_models import caption_lengths_for, condition_for, small_gpt


class StepOnCPU:
    """The interface of ``GPUStep``."""

    def __init__(self, weights: DecodeWeights, rows: int) -> None:
        self.step, self.rows = CPUStep(weights), rows

    def __call__(self, x: Tensor, position: Tensor, first: Tensor | None, keys: Tensor, values: Tensor) -> Tensor:
        assert len(x) <= self.rows
        assert keys.is_contiguous()
        cache, scratch = KVCache(keys, values), Scratch()
        if position.dim():
            logits = torch.empty(len(position), len(x) // len(position), self.step.weights.config.vocab_size)
            new, rows = x.view(*logits.shape[:2], -1).clone(), torch.arange(len(position), dtype=torch.int32)
            self.step(new, cache, first, logits, scratch, cache_rows=rows, starts=position.int())
            return logits.flatten(0, 1)
        logits, cache.length = torch.empty(len(x), self.step.weights.config.vocab_size), int(position)
        self.step(x[:, None].clone(), cache, first, logits, scratch)
        return logits


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "GPUStep", StepOnCPU)
    monkeypatch.setattr(gpu, "find_spec", lambda name: name)
    monkeypatch.setattr(graphs.StepGraphs, "_capture", lambda self, run: SimpleNamespace(replay=run))
    monkeypatch.setattr("torch.compile", lambda function, **_: function)


def request_for(
    kind: str, config: SamplingConfig, seed: int = 11, kept: Tensor | None = None
) -> tuple[Any, SamplingRequest]:
    gpt = small_gpt(condition=kind)
    indices = torch.arange(3) * 37
    return gpt, SamplingRequest.from_inputs(
        gpt, condition_for(gpt, 3), config, caption_lengths_for(gpt, 3), seed, indices, kept
    )
