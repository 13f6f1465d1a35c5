"""Products by Intel's matrix unit (AMX), with a C++ model of its instructions: this needs no such processor."""

import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llamagen.models.kv_cache import KVCache
from llamagen.sampling.cpu import library
from llamagen.sampling.cpu.step import CPUStep, Scratch
from llamagen.sampling.decode_weights import DecodeWeights
from tests.sampling.cpu.test_step import rounded_to_int8
from tests.small_models import codes_for, condition_for, small_gpt

MODEL = Path(__file__).parent / "tile_model.h"
# Sizes that tiles of 32 inputs and 16 outputs fit exactly, and sizes that they do not fit.
SHAPES: dict[str, dict[str, Any]] = {
    "even": {"dim": 64, "vocab_size": 64},
    "odd": {"dim": 40, "n_head": 2, "multiple_of": 8, "vocab_size": 50},
}
SHAPES["odd, adaptive norms"] = {**SHAPES["odd"], "qk_norm": True, "adaptive_norm": True}
needs_gcc = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture
def tile_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compile the step with the model of the instructions."""
    version = hashlib.sha256(MODEL.read_bytes()).hexdigest()[:8]  # the cache knows the command, not this file
    monkeypatch.setenv("CXX", f"g++ -include '{MODEL}' -DMODEL_VERSION=0x{version}")
    library.cpu_library.cache_clear()
    yield
    library.cpu_library.cache_clear()
    torch.set_num_threads(1)


@needs_gcc
@pytest.mark.usefixtures("tile_model")
@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "int8"])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_logits_equal_those_of_the_model_and_rows_do_not_depend_on_each_other(shape: str, int8: bool) -> None:
    gpt = small_gpt(**SHAPES[shape])
    weights = DecodeWeights.from_gpt(gpt, torch.bfloat16, int8)
    reference = rounded_to_int8(small_gpt(**SHAPES[shape])) if int8 else gpt
    rows, vocabulary = 37, gpt.config.vocab_size  # two full tiles of rows, and a part of one
    labels, codes = condition_for(gpt, rows), codes_for(gpt, rows, 4) % 48
    with torch.no_grad():
        expected = reference(codes, labels)
        x = torch.cat([reference.cls_embedding(labels), gpt.tok_embeddings(codes)], dim=1)
        vectors = gpt.all_adaptive_vectors(x[:, 0])
    step = CPUStep(weights)

    def logits(chosen: list[int], threads: int, spans: list[int]) -> Tensor:
        torch.set_num_threads(threads)
        cache, parts, scratch = KVCache.allocate(gpt.config, len(chosen), dtype=torch.bfloat16), [], Scratch()
        if vectors is not None and cache.adaptive is not None:
            cache.adaptive.copy_(vectors[:, chosen])
        for part in x[chosen].split(spans, dim=1):
            out = torch.full((len(chosen), part.shape[1], vocabulary), torch.nan)
            step(part.contiguous(), cache, None, out, scratch)
            parts.append(out)
        return torch.cat(parts, dim=1)

    together = logits(list(range(rows)), 1, [5])
    assert (together - expected).norm() / expected.norm() < 0.012
    assert torch.equal(logits([36, 3, 3], 3, [1, 3, 1]), together[[36, 3, 3]])
    assert torch.equal(logits(list(range(18)), 2, [1, 4]), together[:18])


def test_the_step_compiles_for_the_matrix_unit(tmp_path: Path) -> None:
    compiler, assembly = shutil.which("g++"), tmp_path / "step.s"
    command = [f"{compiler}", "-S", "-O1", "-std=c++17", "-fopenmp", "-DWEIGHT=uint16_t", "-DNARROW=uint16_t"]
    source = ["-march=sapphirerapids", str(library.FOLDER / "step.cpp"), "-o", str(assembly)]
    done = compiler and subprocess.run([*command, *source], capture_output=True, text=True)
    if not done or "sapphirerapids" in done.stderr:  # a compiler without the processor: it cannot use the unit
        assert "tiles.h" in {file.name for file in library.SOURCES}
        return
    assert done.returncode == 0, done.stderr
    found = assembly.read_text()
    assert found.count("tdpbf16ps") >= 6  # two tiles of weights × one and two tiles of rows
    assert all(name in found for name in ("ldtilecfg", "tilerelease", "tileloadd", "tilestored"))


@needs_gcc
def test_a_kernel_that_refuses_the_matrix_unit_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler, source = tmp_path / "compiler", tmp_path / "refused.cpp"
    source.write_text('extern "C" int prepare_processor() { return 95; }\n')
    command = f"g++ -shared -fPIC {source} -o $last"
    compiler.write_text(f"#!/bin/sh\nfor last; do :; done\n[ $last = --version ] || {command}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library.cpu_library.cache_clear()
    with pytest.raises(ValueError, match=r"refuses .* AMX \(Operation not supported\); .* CXX='.* -mno-amx-tile'"):
        library.cpu_library("float", "float")
