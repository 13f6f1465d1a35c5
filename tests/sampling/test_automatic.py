"""When sampling is compiled without being asked to, and what happens if that is not possible."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llamagen.sampling import Sampler, SamplingConfig, automatic, should_compile, try_compiled
from tests.small_models import small_gpt


def test_only_large_models_on_cpus_and_gpus_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    gpt = small_gpt()
    assert not should_compile(gpt)
    count = sum(parameter.numel() for parameter in gpt.parameters())
    monkeypatch.setattr(automatic, "MIN_PARAMETERS", count)
    assert should_compile(gpt)
    assert not should_compile(gpt.to("meta"))
    monkeypatch.setattr(automatic, "MIN_PARAMETERS", count + 1)
    assert not should_compile(small_gpt())


def test_on_gpus_models_with_adaptive_norms_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automatic, "MIN_PARAMETERS", 1)
    for adaptive, kind, expected in ((False, "cuda", True), (True, "cuda", False), (True, "cpu", True)):
        gpt = small_gpt(adaptive_norm=adaptive)
        weight = SimpleNamespace(device=torch.device(kind))
        monkeypatch.setitem(gpt.output.__dict__, "weight", weight)
        assert should_compile(gpt) is expected


def test_models_with_code_factors_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automatic, "MIN_PARAMETERS", 1)
    gpt = small_gpt(code_factors=(6, 8))
    assert not should_compile(gpt)
    with pytest.raises(
        ValueError, match=r"^sampling is not compiled for models with code_factors; leave compiled out$"
    ):
        Sampler(gpt, 2, compiled=True)


def test_a_failure_to_compile_is_a_warning_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    gpt, labels = small_gpt(), torch.arange(2)
    sampler = try_compiled(lambda: Sampler(gpt, 2, compiled=True), SamplingConfig())
    assert sampler is not None
    assert torch.equal(sampler(labels), Sampler(gpt, 2)(labels))

    def refuse(*_: Any) -> None:
        raise OSError("no\ncompiler")

    monkeypatch.setattr("llamagen.sampling.cpu.step.cpu_library", refuse)
    with pytest.warns(UserWarning, match="^sampling is not compiled: OSError: no compiler$"):
        assert try_compiled(lambda: Sampler(gpt, 2, compiled=True), SamplingConfig()) is None
