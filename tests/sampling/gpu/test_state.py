"""The decode loop of GPUs, tested without one: direct calls replace CUDA graphs, and the C++ pass replaces Triton."""

import threading
from functools import partial

import pytest
import torch
from torch import Tensor

from llamagen.sampling import SamplingConfig
from llamagen.sampling.gpu import decoder as gpu
from llamagen.sampling.gpu import graphs
from tests.sampling.gpu.without_gpu import no_gpu, request_for  # noqa: F401
from tests.sampling.plain import SETTINGS, plain_loop
from tests.small_models import codes_for, small_gpt

pytestmark = pytest.mark.usefixtures("no_gpu")


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
@pytest.mark.parametrize("count", [1, 4, 9, 15, 16])
@pytest.mark.parametrize("setting", ["sampled, guided", "sampled, guided from code 3 to 9", "sampled, linear"])
@pytest.mark.parametrize("kind", ["class", "text"])
def test_codes_after_kept_ones_equal_those_of_uncached_sampling(kind: str, setting: str, count: int) -> None:
    config, kept = SamplingConfig(**SETTINGS[setting]), codes_for(small_gpt(), 3, count)
    gpt, request = request_for(kind, config, kept=kept)
    decoder = gpu.GPUCodeDecoder(gpt, 3, torch.float32)
    expected = plain_loop(gpt, request.condition, config, request.caption_lengths, 11, request.indices, kept)
    for _ in range(2):
        assert torch.equal(decoder(request).codes, expected)
    _, without = request_for(kind, config)
    assert torch.equal(
        decoder(without).codes,
        plain_loop(gpt, without.condition, config, without.caption_lengths, 11, without.indices),
    )


@torch.no_grad()
def test_graphs_of_settings_that_were_not_used_for_long_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 3)
    captured, capture = list[float](), graphs.StepGraphs._capture

    def counted(self: graphs.StepGraphs, run: partial[None]) -> graphs.Graph:
        captured.append(run.args[0].temperature)
        return capture(self, run)

    monkeypatch.setattr(graphs.StepGraphs, "_capture", counted)
    gpt, _ = request_for("class", SamplingConfig())
    decoder = gpu.GPUCodeDecoder(gpt, 3, torch.float32)
    for temperature in (1.0, 2.0, 3.0, 1.0, 4.0, 1.0, 2.0):  # 2.0 is dropped for 4.0
        config = SamplingConfig(temperature)
        _, request = request_for("class", config)
        expected = plain_loop(gpt, request.condition, config, None, 11, request.indices)
        assert torch.equal(decoder(request).codes, expected)
    assert captured == [1.0, 2.0, 3.0, 4.0, 2.0]


@torch.no_grad()
def test_an_exception_of_the_callback_frees_the_graphs() -> None:
    gpt, request = request_for("class", SamplingConfig(0.0, guidance_scale=2.0))
    decoder, parts = gpu.GPUCodeDecoder(gpt, 3, torch.float32), list[Tensor]()

    def stop(codes: Tensor, count: int) -> None:
        parts.append(codes[:, :count])
        if count == 8:
            raise ArithmeticError

    expected = decoder(request).codes
    with pytest.raises(ArithmeticError):
        decoder(request, stop)
    assert torch.equal(decoder(request).codes, expected)
    assert [part.shape[1] for part in parts] == [4, 8]
    assert torch.equal(parts[1], expected[:, :8])


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


def test_adaptive_norms_are_refused_in_one_line() -> None:
    gpt, _ = request_for("class", SamplingConfig(), adaptive_norm=True)
    message = "^sampling on GPUs is not compiled for adaptive norms; leave compiled out$"
    with pytest.raises(ValueError, match=message):
        gpu.GPUCodeDecoder(gpt, 3, torch.float32)


def test_several_codes_at_once_and_positions_are_not_available() -> None:
    gpt, request = request_for("class", SamplingConfig())
    refusal = pytest.raises(NotImplementedError, match="one code at a time in raster order; sample without compiling")
    with torch.no_grad(), gpu.GPUCodeDecoder(gpt, 3, torch.float32).start(request) as state, refusal:
        state.decode(torch.zeros(3, 1, dtype=torch.int64), torch.arange(1))
