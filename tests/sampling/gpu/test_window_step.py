"""Kernels that read several tokens of a row compute what the model computes without a cache.

They need a GPU, or Triton's interpreter: ``TRITON_INTERPRET=1 pytest -m gpu tests/sampling/gpu/test_window_step.py``.
The interpreter does not compute products in bfloat16 correctly, so there float16 stands for it.
"""

import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llamagen.models.gpt import GPT
from llamagen.models.kv_cache import KVCache
from llamagen.sampling import SamplingConfig
from llamagen.sampling.decode_weights import DecodeWeights
from llamagen.sampling.gpu.decoder import GPUCodeDecoder
from llamagen.sampling.gpu.graphs import StepGraphs
from llamagen.sampling.gpu.step import GPUStep
from llamagen.sampling.inputs import SamplingRequest
from tests.sampling.gpu.test_step import TOLERANCE, rounded
from tests.sampling.plain import plain_loop
from tests.small_models import caption_lengths_for, codes_for, condition_for, small_gpt

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HALF = torch.float16 if INTERPRETED else torch.bfloat16
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STARTS = [4, 0, 8, 3]
"""Codes of each row that are in the cache."""
SHAPES = {
    "class": {},
    "text, grouped": {"condition": "text", "n_kv_head": 2},
    "text, grouped, QK-norm": {"condition": "text", "n_kv_head": 2, "qk_norm": True},
    "heads of 100": {"dim": 200, "n_head": 2, "n_kv_head": 1, "multiple_of": 24},
}


def _matmul(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A product whose sums all have the same order. BLAS rounds the rows of a matrix differently."""
    total = np.zeros(a.shape[:-1] + b.shape[-1:], dtype)
    for k in range(a.shape[-1]):
        total += a[..., k, None] * b[..., k, None, :]
    return total


class Batch:
    """Codes, cache and expected logits of a batch."""

    def __init__(self, gpt: GPT, dtype: torch.dtype, **options: Any) -> None:
        self.gpt, batch = gpt.to(DEVICE), len(STARTS)
        self.codes, condition = codes_for(gpt, batch, 15).to(DEVICE), condition_for(gpt, batch).to(DEVICE)
        lengths = caption_lengths_for(gpt, batch)
        self.first = None if lengths is None else (gpt.config.condition_length - lengths).int().to(DEVICE)
        lengths = None if lengths is None else lengths.to(DEVICE)
        model = rounded(gpt, dtype, False)
        self.expected = model(self.codes, condition, caption_lengths=lengths)[:, 1:]
        cache = KVCache.allocate(gpt.config, batch, torch.device(DEVICE))
        model(self.codes, condition, caption_lengths=lengths, cache=cache)
        self.starts = torch.tensor(STARTS, device=DEVICE) + gpt.config.condition_length
        places = torch.arange(cache.keys.shape[3], device=DEVICE)
        empty = places >= self.starts[:, None]
        if self.first is not None:
            empty |= places < self.first[:, None]
        for part in (cache.keys, cache.values):
            part.movedim(3, 2)[:, empty] = torch.nan
        self.keys, self.values = cache.keys.to(dtype), cache.values.to(dtype)
        self.step = GPUStep(DecodeWeights.from_gpt(gpt, dtype), batch * 15, **options)

    def read(self, window: int, shift: int = 0, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (R, T, V) after T codes of each row, and the expected ones."""
        starts = self.starts + shift if starts is None else starts
        places = starts[:, None] - self.gpt.config.condition_length + torch.arange(window, device=DEVICE)
        inside = places.clamp(max=14)
        x = self.gpt.tok_embeddings(self.codes.gather(1, inside)).float().flatten(0, 1)
        logits = self.step(x, starts, self.first, self.keys, self.values)
        rows = torch.arange(len(starts), device=DEVICE)[:, None]
        return logits.view(len(starts), window, -1), self.expected[rows, inside]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_each_row_reads_several_tokens_at_its_own_place(shape: str, dtype: torch.dtype) -> None:
    batch = Batch(small_gpt(**SHAPES[shape]), dtype)
    found, expected = batch.read(5)
    again, expected_again = batch.read(2, 5)
    error = torch.cat([found - expected, again - expected_again], 1).abs().max()
    assert error < TOLERANCE[dtype] * expected.std()
    assert batch.keys[1, 1, :, int(batch.starts[1]) + 7 :].isnan().all(), "nothing is written after the window"


@torch.no_grad()
@pytest.mark.parametrize("shape", ["class", "text, grouped", "text, grouped, QK-norm"])
def test_float32_logits_do_not_depend_on_the_window(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setattr("numpy.matmul", _matmul)
    batch = Batch(small_gpt(**SHAPES[shape]), torch.float32)
    one_by_one = torch.cat([batch.read(1, shift)[0] for shift in range(6)], 1)
    for window in (6, 3):
        parts = torch.cat([batch.read(window, shift)[0] for shift in range(0, 6, window)], 1)
        assert torch.equal(parts, one_by_one)
    equal = torch.full_like(batch.starts, int(batch.starts[1]))
    x = batch.gpt.tok_embeddings(batch.codes[:, 0]).float()
    shared = batch.step(x, equal[0], batch.first, batch.keys, batch.values)
    assert torch.equal(shared, batch.read(1, starts=equal)[0][:, 0])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_tokens_beyond_the_capacity_are_not_written(dtype: torch.dtype) -> None:
    batch = Batch(small_gpt(), dtype)
    batch.keys.nan_to_num_(), batch.values.nan_to_num_()
    expected = batch.read(3, starts=torch.full_like(batch.starts, 13))[0][:, :3]
    before = batch.keys.clone()
    found = batch.read(9, starts=torch.full_like(batch.starts, 13))[0][:, :3]
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(batch.keys, before, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], equal_nan=True)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_a_token_that_is_not_finite_does_not_change_those_before_it(dtype: torch.dtype) -> None:
    batch = Batch(small_gpt(), dtype)
    expected = batch.read(5)[0]
    batch.gpt.tok_embeddings.weight[batch.codes[0, STARTS[0] + 3]] = torch.nan
    found = batch.read(5)[0]
    assert torch.equal(found[0, :3], expected[0, :3])
    assert found[0, 3:].isnan().all()


@torch.no_grad()
def test_a_window_may_have_more_queries_than_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamagen.sampling.gpu.attention_launch.MAX_QUERIES", 16)
    monkeypatch.setattr("llamagen.sampling.gpu.attention_launch.WINDOW_BLOCK", 16)
    batch = Batch(small_gpt(condition="text", n_kv_head=1, block_size=36), HALF)
    found, expected = batch.read(7)
    assert (found - expected).abs().max() < TOLERANCE[HALF] * expected.std()


@torch.no_grad()
def test_positions_that_do_not_fit_are_an_error() -> None:
    batch = Batch(small_gpt(), torch.float32)
    with pytest.raises(ValueError, match=r"one for each row, not of shape \(4, 1\)"):
        batch.step(torch.zeros(4, 32, device=DEVICE), batch.starts[:, None], None, batch.keys, batch.values)


@torch.no_grad()
@pytest.mark.skipif(not INTERPRETED, reason="on a GPU test_decoder.py tests this with graphs")
@pytest.mark.parametrize(
    "options",
    [{}, {"condition": "text"}, {"qk_norm": True, "target_aware": True}],
    ids=["class", "text", "QK-norm, target-aware"],
)
def test_the_loop_over_the_kernels_samples_the_codes_of_uncached_sampling(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.compile", lambda function, **_: function)
    monkeypatch.setattr("llamagen.sampling.gpu.decoder.find_spec", lambda name: name)
    monkeypatch.setattr(StepGraphs, "_capture", lambda self, run: SimpleNamespace(replay=run))
    config = SamplingConfig(0.9, 30, 0.95, 2.0, guidance_steps=5, window=4)
    gpt = small_gpt(n_layer=1, block_size=9, **options)
    condition, lengths, indices = condition_for(gpt, 2), caption_lengths_for(gpt, 2), torch.arange(2)
    request = SamplingRequest.from_inputs(gpt, condition, config, lengths, 11, indices)
    found = GPUCodeDecoder(gpt, 2, torch.float32)(request).codes
    assert torch.equal(found, plain_loop(gpt, condition, config, lengths, 11, indices))
