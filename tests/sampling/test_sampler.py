"""A sampler draws the codes of plain sampling, compiled or not, in any batch, and its memory serves many calls."""

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llamagen.models.gpt import GPT
from llamagen.models.kv_cache import KVCache
from llamagen.sampling import Sampler, SamplingConfig, code_counters, draw, gumbel, seed_tensor
from llamagen.sampling.cpu import library as cpu_library
from llamagen.sampling.cpu.step import CPUStep
from llamagen.sampling.decode_weights import DecodeWeights
from tests.sampling.plain import SETTINGS, plain_loop
from tests.small_models import GPT_VARIANTS, caption_lengths_for, codes_for, condition_for, small_gpt

HEADS: dict[str, dict[str, Any]] = {
    f"heads of {size}, {kind}{' grouped' if kv else ''}": {
        "dim": 2 * size, "n_head": 2, "n_kv_head": kv, "condition": kind, "vocab_size": 50, "multiple_of": 24,
    }
    for size in (32, 64, 100, 128) for kind, kv in (("class", None), ("text", 1))
}  # fmt: skip
VARIANTS = GPT_VARIANTS | HEADS


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def inputs(gpt: GPT, batch: int) -> tuple[Tensor, Tensor | None, Tensor]:
    return condition_for(gpt, batch), caption_lengths_for(gpt, batch), (torch.arange(batch) * 37 + 4) % 1000


CASES = [(variant, setting) for variant in GPT_VARIANTS for setting in SETTINGS]
CASES += [
    (variant, setting) for variant in HEADS for setting in ("greedy, guided", "sampled, guided", "sampled, linear")
]


@pytest.mark.parametrize(("variant", "setting"), CASES)
def test_compiled_codes_are_those_of_plain_uncached_sampling(variant: str, setting: str) -> None:
    gpt, config = small_gpt(**VARIANTS[variant]), SamplingConfig(**SETTINGS[setting])
    condition, lengths, indices = inputs(gpt, 5)
    expected = plain_loop(gpt, condition, config, lengths, 11, indices)
    sampler = Sampler(gpt, 3, compiled=True)  # a full batch and one of two
    assert torch.equal(sampler(condition, config, caption_lengths=lengths, seed=11, indices=indices), expected)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", ["class", "text"])
def test_codes_are_the_same_for_all_batch_sizes_and_orders(kind: str, compiled: bool) -> None:
    gpt, config = small_gpt(condition=kind), SamplingConfig(0.9, 30, 0.95, 2.0, guidance_steps=9)
    condition, lengths, indices = inputs(gpt, 23)
    expected = plain_loop(gpt, condition, config, lengths, -3, indices)
    for batch_size in (1, 7, 23, 64):
        sampler = Sampler(gpt, batch_size, compiled=compiled)
        found = sampler(condition, config, caption_lengths=lengths, seed=-3, indices=indices)
        assert torch.equal(found, expected)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    some = None if lengths is None else lengths[order]
    found = sampler(condition[order], config, caption_lengths=some, seed=-3, indices=indices[order])
    assert torch.equal(found, expected[order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("dim", "heads"), [(144, 3), (200, 2)])
def test_compiled_logits_of_a_row_are_the_same_bits_in_any_batch_and_on_any_number_of_threads(
    dim: int, heads: int, int8: bool, dtype: torch.dtype
) -> None:
    gpt = small_gpt(dim=dim, n_head=heads, condition="text", vocab_size=100)
    weights = DecodeWeights.from_gpt(gpt, dtype, int8)
    features, codes, first = condition_for(gpt, 13), codes_for(gpt, 13, 4), torch.arange(13).int() % 6
    with torch.no_grad():
        embedded = torch.cat([gpt.cls_embedding(one) for one in features.split(1)])
        parts = (embedded, *gpt.tok_embeddings(codes).split(1, dim=1))

    def logits(rows: list[int], threads: int) -> Tensor:
        torch.set_num_threads(threads)
        step, cache, found = CPUStep(weights), KVCache.allocate(gpt.config, len(rows), dtype=dtype), []
        out = torch.empty(len(rows), 100)
        for x in parts:
            step(x[rows].contiguous(), cache, first[rows], out)
            found.append(out.clone())
        torch.set_num_threads(1)
        return torch.stack(found, dim=1)

    together = logits(list(range(13)), 1)
    assert torch.equal(logits(list(range(13)), 3), together)
    assert torch.equal(torch.cat([logits([row], 1) for row in range(13)]), together)
    assert torch.equal(logits([12, 3, 3], 2), together[[12, 3, 3]])


@torch.no_grad()
def rounded_to_int8(gpt: GPT) -> GPT:
    """The model with its matrices rounded to what int8 keeps of them."""
    for name, weight in gpt.named_parameters():
        if weight.dim() == 2 and "embed" not in name:
            scale = weight.abs().amax(1, keepdim=True) / 127
            weight.copy_((weight / scale).round() * scale)
    return gpt


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 2e-6), (torch.bfloat16, 0.012)])
@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_compiled_logits_are_those_of_the_model(variant: str, int8: bool, dtype: torch.dtype, allowed: float) -> None:
    gpt = small_gpt(**VARIANTS[variant])
    weights = DecodeWeights.from_gpt(gpt, dtype, int8)
    reference = rounded_to_int8(small_gpt(**VARIANTS[variant])) if int8 else gpt
    condition, lengths, codes = condition_for(gpt, 5), caption_lengths_for(gpt, 5), codes_for(gpt, 5, 15) % 48
    step, cache = CPUStep(weights), KVCache.allocate(gpt.config, 5, dtype=dtype)
    cache.keys.fill_(torch.nan)  # what was there before is never read
    cache.values.fill_(torch.nan)
    first = None if lengths is None else (6 - lengths).int()
    found, out = [], torch.empty(5, gpt.config.vocab_size)
    with torch.no_grad():
        expected = reference(codes, condition, caption_lengths=lengths)
        for x in (reference.cls_embedding(condition), *gpt.tok_embeddings(codes).split(1, dim=1)):
            step(x.clone(memory_format=torch.contiguous_format), cache, first, out)
            found.append(out.clone())
    assert (torch.stack(found, dim=1) - expected).norm() / expected.norm() < allowed


def test_int8_weights_are_within_half_a_level_and_zeros_stay() -> None:
    gpt = small_gpt()
    with torch.no_grad():
        gpt.output.weight[3] = 0
    head = DecodeWeights.from_gpt(gpt, torch.float32, int8=True).head
    assert head.scale is not None
    assert head.values.dtype is torch.int8
    assert ((head.values * head.scale[:, None] - gpt.output.weight).abs() <= 0.501 * head.scale[:, None]).all()
    assert int(head.values.max()) == 127
    assert not head.values[3].any()


def test_a_float32_sampler_reads_the_model_s_own_weights_and_sees_them_change() -> None:
    gpt = small_gpt()
    sampler = Sampler(gpt, 2, compiled=True)
    before = sampler(torch.arange(2))
    weights = DecodeWeights.from_gpt(gpt, torch.float32)
    assert weights.head.values.data_ptr() == gpt.output.weight.data_ptr()
    assert weights.layers[1].w2.values.data_ptr() == gpt.layers[1].feed_forward.w2.weight.data_ptr()
    with torch.no_grad():
        gpt.output.weight.neg_()
    after = sampler(torch.arange(2))
    assert not torch.equal(after, before)
    assert torch.equal(after, plain_loop(gpt, torch.arange(2), SamplingConfig(), None, 0, torch.arange(2)))


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(),
        SamplingConfig(0.0),
        SamplingConfig(0.7, top_k=40),
        SamplingConfig(1.2, top_p=0.8),
        SamplingConfig(0.9, top_k=300, top_p=0.9),
        SamplingConfig(1e-38),
        SamplingConfig(1.0, top_k=1),
        SamplingConfig(1.0, top_k=5000, top_p=1e-9),
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [None, 1.0, 0.0, 3.5])
def test_compiled_draws_are_those_of_draw(config: SamplingConfig, scale: float | None) -> None:
    batch, vocabulary = 40, 1003
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(batch if scale is None else 2 * batch, vocabulary, generator=generator)
    if scale is None:
        logits[5, 100:] = -torch.inf
    logits[6] = 0.0
    guided = logits if scale is None else scale * logits[:batch] + (1 - scale) * logits[batch:]
    if scale is not None:
        guided = torch.where(torch.tensor(scale == 1.0), logits[:batch], guided)
    indices, codes = torch.arange(batch) * 11, torch.full((batch, 3), -1)
    step = CPUStep(DecodeWeights.from_gpt(small_gpt(), torch.float32))
    seed = -7 + 2**63
    broken = torch.zeros(batch, dtype=torch.bool)
    step.draw(logits, config, 1.0 if scale is None else scale, seed, indices, 2, codes, broken)
    assert broken.nonzero().flatten().tolist() == ([5] if scale is None else [])
    noise = gumbel(seed_tensor(seed), indices, torch.tensor(2), code_counters(vocabulary))
    assert torch.equal(codes[:, 2], draw(guided, config, noise))
    assert (codes[:, :2] == -1).all()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_cache_is_allocated_once_for_many_calls(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gpt, made = small_gpt(), []
    allocate = KVCache.allocate
    monkeypatch.setattr(KVCache, "allocate", lambda *args: made.append(args[1]) or allocate(*args))
    sampler = Sampler(gpt, 4, compiled=compiled)
    for count, scale in ((9, 2.0), (1, 1.0), (4, 3.0)):
        sampler(torch.zeros(count, dtype=torch.int64), SamplingConfig(guidance_scale=scale))
    assert made == [8]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_default_dtype_of_pure_bfloat16_runs_changes_nothing(compiled: bool) -> None:
    gpt, config = small_gpt(), SamplingConfig(0.9, 30, 0.95, 2.7, guidance_schedule="linear")
    expected = Sampler(gpt, 4, compiled=compiled)(torch.arange(4), config)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = Sampler(gpt, 4, compiled=compiled)(torch.arange(4), config)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_indices_may_be_of_any_integer_type(compiled: bool) -> None:
    sampler, labels, indices = Sampler(small_gpt(), 2, compiled=compiled), torch.arange(5), torch.arange(3, 8)
    assert torch.equal(sampler(labels, indices=indices.int()), sampler(labels, indices=indices))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast", "int8"])
def test_changes_of_the_weights_in_place_are_seen(kind: str) -> None:
    def made(gpt: GPT) -> Sampler:
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            return Sampler(gpt, 3, compiled=True, int8=kind == "int8")

    gpt = small_gpt().bfloat16() if kind == "bfloat16" else small_gpt()
    sampler, labels = made(gpt), torch.arange(3)
    before = sampler(labels)
    with torch.no_grad():
        for weight in gpt.parameters():  # norms and matrices
            weight.mul_(-1.5)
    after = sampler(labels)
    assert not torch.equal(after, before)
    assert torch.equal(after, made(gpt)(labels))


def test_a_model_whose_weights_were_replaced_is_refused() -> None:
    gpt = small_gpt()
    sampler = Sampler(gpt, 1, compiled=True)
    gpt.load_state_dict({name: value.clone() for name, value in gpt.state_dict().items()}, assign=True)
    with pytest.raises(ValueError, match="its weights were replaced, behind the sampler; make a new one"):
        sampler(torch.arange(1))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_sampler_that_was_made_in_inference_mode_serves_calls_outside(compiled: bool) -> None:
    gpt = small_gpt()
    with torch.inference_mode():
        sampler = Sampler(gpt, 2, compiled=compiled)
        sampler.prepare(SamplingConfig())
    assert torch.equal(sampler(torch.arange(2)), Sampler(gpt, 2)(torch.arange(2)))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_sampler_serves_calls_within_inference_mode_and_outside(compiled: bool) -> None:
    gpt = small_gpt()
    sampler = Sampler(gpt, 2, compiled=compiled)
    with torch.inference_mode():
        inside = sampler(torch.arange(2))
    assert torch.equal(sampler(torch.arange(2)), inside)
    with torch.inference_mode():
        assert torch.equal(sampler(torch.arange(2)), inside)


def test_under_autocast_compiled_steps_compute_in_bfloat16() -> None:
    gpt = small_gpt()
    with torch.autocast("cpu", torch.bfloat16):
        sampler = Sampler(gpt, 2, compiled=True)
    assert sampler.decoder.dtype is torch.bfloat16
    expected = Sampler(small_gpt().bfloat16(), 2, compiled=True)(torch.arange(2), SamplingConfig(0.0))
    assert (sampler(torch.arange(2), SamplingConfig(0.0)) == expected).float().mean() > 0.5  # embeddings differ a bit


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpu_library.cpu_library.cache_clear()
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler; install g\+\+ or clang\+\+"):
        Sampler(small_gpt(), 1, compiled=True)


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'x.cpp:1: error: no luck today' >&2\nexit 1\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    cpu_library.cpu_library.cache_clear()
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"broken could not compile .*no luck today"):
        Sampler(small_gpt(), 1, compiled=True)
    assert os.listdir(tmp_path / "cache" / "llamagen") == []


def test_a_compiler_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_library.cpu_library.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"no-such-compiler cannot be run .*; set CXX"):
        Sampler(small_gpt(), 1, compiled=True)


def test_where_the_home_folder_cannot_be_written_to_another_place_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cpu_library.cpu_library.cache_clear()
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    Sampler(small_gpt(), 1, compiled=True)
    assert len(list(tmp_path.glob("cache-*/llamagen/cpu_step_*.so"))) == 1


def test_what_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise OSError("failed to map segment from shared object")

    cpu_library.cpu_library.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr("ctypes.CDLL", refuse)
        with pytest.raises(ValueError, match=r"cannot be loaded \(failed to map .*; set XDG_CACHE_HOME"):
            Sampler(small_gpt(), 1, compiled=True)


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 1, "int8": True}, "int8 weights are for compiled sampling"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], phrase: str) -> None:
    with pytest.raises(ValueError, match=phrase):
        Sampler(small_gpt(), **options)


def test_half_precision_on_a_cpu_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"float32 and bfloat16, not for torch\.float16"):
        Sampler(small_gpt().half(), 1, compiled=True)
