"""The decode loop of GPUs, tested without one: direct calls replace CUDA graphs, and the C++ pass replaces Triton."""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from llamagen.models.kv_cache import KVCache
from llamagen.sampling import SamplingConfig
from llamagen.sampling.cpu.step import CPUStep, Scratch
from llamagen.sampling.decode_weights import DecodeWeights
from llamagen.sampling.gpu import decoder as gpu
from llamagen.sampling.inputs import SamplingRequest
from tests.sampling.plain import SETTINGS, plain_loop
from tests.small_models import caption_lengths_for, condition_for, small_gpt


class StepOnCPU:
    """The interface of ``GPUStep``."""

    def __init__(self, weights: DecodeWeights, rows: int) -> None:
        self.step, self.rows = CPUStep(weights), rows

    def __call__(self, x: Tensor, position: Tensor, first: Tensor | None, keys: Tensor, values: Tensor) -> Tensor:
        assert len(x) <= self.rows
        assert keys.is_contiguous()
        logits = torch.empty(len(x), self.step.weights.config.vocab_size)
        self.step(x[:, None].clone(), KVCache(keys, values, int(position)), first, logits, Scratch())
        return logits


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(self: gpu.StepGraphs, config: SamplingConfig, guided: bool) -> Callable[[], None]:
        return partial(self._one_step, config, guided)

    monkeypatch.setattr(gpu, "GPUStep", StepOnCPU)
    monkeypatch.setattr(gpu, "find_spec", lambda name: name)
    monkeypatch.setattr(gpu.StepGraphs, "_capture", capture)
    monkeypatch.setattr("torch.compile", lambda function, **_: function)


def request_for(kind: str, config: SamplingConfig, seed: int = 11) -> tuple[Any, SamplingRequest]:
    gpt = small_gpt(condition=kind)
    indices = torch.arange(3) * 37
    return gpt, SamplingRequest.from_inputs(
        gpt, condition_for(gpt, 3), config, caption_lengths_for(gpt, 3), seed, indices
    )


@torch.no_grad()
@pytest.mark.parametrize("setting", list(SETTINGS))
@pytest.mark.parametrize("kind", ["class", "text"])
def test_codes_equal_those_of_uncached_sampling(kind: str, setting: str) -> None:
    config = SamplingConfig(**SETTINGS[setting])
    gpt, request = request_for(kind, config)
    decoder = gpu.GPUCodeDecoder(gpt, 3, torch.float32)
    decoder.prepare(config)
    expected = plain_loop(gpt, request.condition, config, request.caption_lengths, 11, request.indices)
    first, again = decoder(request), decoder(request)
    assert torch.equal(first.codes, expected)
    assert torch.equal(again.codes, expected)
    assert first.codes.data_ptr() != again.codes.data_ptr()
    assert not first.broken.any()


@torch.no_grad()
def test_a_call_from_a_second_thread_is_an_error_and_does_not_disturb_the_first() -> None:
    gpt, request = request_for("class", SamplingConfig(0.0, guidance_scale=2.0))
    decoder, errors = gpu.GPUCodeDecoder(gpt, 3, torch.float32), list[str]()
    expected = decoder(request).codes

    def call() -> None:
        with pytest.raises(RuntimeError) as error:
            decoder(request)
        errors.append(str(error.value))

    with decoder.start(request) as state:
        state.sample(state.prefill(), 0)
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        for step in range(1, 16):
            state.advance(step)
        assert torch.equal(state.result().codes, expected)
    assert len(errors) == 1
    assert "already sampling in another thread" in errors[0]
    assert "\n" not in errors[0]
    assert torch.equal(decoder(request).codes, expected)


def test_several_codes_at_once_and_positions_are_not_available() -> None:
    gpt, request = request_for("class", SamplingConfig())
    refusal = pytest.raises(NotImplementedError, match="one code at a time in raster order; sample without compiling")
    with torch.no_grad(), gpu.GPUCodeDecoder(gpt, 3, torch.float32).start(request) as state, refusal:
        state.decode(torch.zeros(3, 1, dtype=torch.int64), torch.arange(1))
