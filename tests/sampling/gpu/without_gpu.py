"""The engine of GPUs without one: direct calls replace CUDA graphs, and the C++ pass replaces Triton."""

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llamagen.models.kv_cache import KVCache
from llamagen.sampling import SamplingConfig
from llamagen.sampling.cpu.library import cpu_library
from llamagen.sampling.cpu.step import TYPES, CPUStep, Scratch
from llamagen.sampling.decode_weights import DecodeWeights
from llamagen.sampling.gpu import decoder as gpu
from llamagen.sampling.gpu import graphs
from llamagen.sampling.inputs import SamplingRequest
from tests.small_models import caption_lengths_for, condition_for, small_gpt


class StepOnCPU:
    """The interface of ``GPUStep``."""

    def __init__(self, weights: DecodeWeights, rows: int) -> None:
        self.step, self.rows = CPUStep(weights), rows
        library, dtype = cpu_library(TYPES[weights.head.values.dtype], TYPES[weights.dtype]), weights.dtype
        self.lanes, self.pair = ctypes.c_int32.in_dll(library, "cache_lanes").value, 4 // dtype.itemsize

    def order(self, positions: int, width: int) -> tuple[Tensor, Tensor]:
        """For each element of the keys and values of a head in the layout of ``attention.h``: its usual place."""
        places = torch.arange(positions * width).view(positions, width)
        blocks = [block.unflatten(1, (-1, self.pair)).transpose(0, 1).flatten() for block in places.split(self.lanes)]
        return torch.cat(blocks), torch.cat([word.t().flatten() for word in places.split(self.pair)])

    def __call__(self, x: Tensor, position: Tensor, first: Tensor | None, keys: Tensor, values: Tensor) -> Tensor:
        assert len(x) <= self.rows
        assert keys.is_contiguous()
        flat, scratch = [keys.flatten(-2), values.flatten(-2)], Scratch()
        orders = self.order(*keys.shape[-2:])
        cache = KVCache(*(part[..., order].view_as(keys) for part, order in zip(flat, orders, strict=True)))
        if position.dim():
            logits = torch.empty(len(position), len(x) // len(position), self.step.weights.config.vocab_size)
            new, rows = x.view(*logits.shape[:2], -1).clone(), torch.arange(len(position), dtype=torch.int32)
            self.step(new, cache, first, logits, scratch, cache_rows=rows, starts=position.int())
        else:
            logits, cache.length = torch.empty(len(x), self.step.weights.config.vocab_size), int(position)
            self.step(x[:, None].clone(), cache, first, logits, scratch)
        for part, order, new in zip(flat, orders, (cache.keys, cache.values), strict=True):
            part[..., order] = new.flatten(-2)
        return logits.flatten(0, -2)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "GPUStep", StepOnCPU)
    monkeypatch.setattr(gpu, "find_spec", lambda name: name)
    monkeypatch.setattr(graphs.StepGraphs, "_capture", lambda self, run: SimpleNamespace(replay=run))
    monkeypatch.setattr("torch.compile", lambda function, **_: function)


def request_for(
    kind: str, config: SamplingConfig, seed: int = 11, kept: Tensor | None = None, **options: Any
) -> tuple[Any, SamplingRequest]:
    gpt = small_gpt(condition=kind, **options)
    indices = torch.arange(3) * 37
    return gpt, SamplingRequest.from_inputs(
        gpt, condition_for(gpt, 3), config, caption_lengths_for(gpt, 3), seed, indices, kept
    )
