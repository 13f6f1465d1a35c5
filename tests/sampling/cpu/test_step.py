"""The compiled pass on CPUs computes what the model computes, and samples the codes that ``sample_codes`` samples."""

from typing import Any

import pytest
import torch
from torch import Tensor

from llamagen.models.gpt import GPT
from llamagen.models.kv_cache import KVCache
from llamagen.sampling import SamplingConfig, code_counters, gumbel, sample_codes, seed_tensor
from llamagen.sampling.cpu.step import CPUStep, Scratch
from llamagen.sampling.decode_weights import DecodeWeights
from llamagen.sampling.draws import Draws
from tests.small_models import (
    GPT_VARIANTS,
    HEAD_VARIANTS,
    RECIPE_VARIANTS,
    caption_lengths_for,
    codes_for,
    condition_for,
    small_gpt,
)

# Target-aware models differ in the embedded tokens only.
VARIANTS = GPT_VARIANTS | HEAD_VARIANTS | {name: RECIPE_VARIANTS[name] for name in RECIPE_VARIANTS if "QK" in name}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"dim": 144, "n_head": 3, "condition": "text"},
        {"dim": 200, "n_head": 2, "condition": "text", "qk_norm": True},
        {"dim": 144, "n_head": 3, "qk_norm": True, "adaptive_norm": True},
    ],
    ids=["48", "100, QK-norm", "adaptive norms"],
)
def test_logits_of_a_row_do_not_depend_on_the_batch_or_the_number_of_threads(
    options: dict[str, Any], int8: bool, dtype: torch.dtype
) -> None:
    gpt = small_gpt(vocab_size=100, **options)
    weights = DecodeWeights.from_gpt(gpt, dtype, int8)
    features, codes, first = condition_for(gpt, 13), codes_for(gpt, 13, 4), torch.arange(13).int() % 6
    with torch.no_grad():
        embedded = torch.cat([gpt.cls_embedding(one) for one in features.split(1)])
        parts = (embedded, *gpt.tok_embeddings(codes).split(1, dim=1))
        vectors = gpt.all_adaptive_vectors(embedded[:, 0])

    def logits(rows: list[int], threads: int) -> Tensor:
        torch.set_num_threads(threads)
        step, cache, found = CPUStep(weights), KVCache.allocate(gpt.config, len(rows), dtype=dtype), []
        if vectors is not None and cache.adaptive is not None:
            cache.adaptive.copy_(vectors[:, rows])
        scratch = Scratch()
        out = torch.empty(len(rows), 100)
        for x in parts:
            step(x[rows].contiguous(), cache, first[rows], out, scratch)
            found.append(out.clone())
        torch.set_num_threads(1)
        return torch.stack(found, dim=1)

    together = logits(list(range(13)), 1)
    assert torch.equal(logits(list(range(13)), 3), together)
    assert torch.equal(torch.cat([logits([row], 1) for row in range(13)]), together)
    assert torch.equal(logits([12, 3, 3], 2), together[[12, 3, 3]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("dim", "heads", "kv_heads"), [(144, 3, 3), (200, 2, 1), (128, 1, 1), (64, 8, 2)], ids=["48", "100", "128", "8"]
)
def test_logits_of_a_token_do_not_depend_on_the_other_tokens_of_its_pass(
    dim: int, heads: int, kv_heads: int, dtype: torch.dtype
) -> None:
    gpt = small_gpt(dim=dim, n_head=heads, n_kv_head=kv_heads, condition="text", vocab_size=100)
    step, count = CPUStep(DecodeWeights.from_gpt(gpt, dtype)), 15
    tokens = torch.randn(3, 6 + count, dim, generator=torch.Generator().manual_seed(1))
    first = torch.tensor([0, 3, 5], dtype=torch.int32)

    def logits(sizes: list[int], threads: int = 1, broken: bool = False) -> Tensor:
        cache, found = KVCache.allocate(gpt.config, 3, dtype=dtype), []
        cache.keys.fill_(torch.nan)
        cache.values.fill_(torch.nan)
        torch.set_num_threads(threads)
        scratch = Scratch()
        scratch.pointer(2**20)
        scratch._bytes.fill_(255)  # NaN: no pass reads memory that it has not written
        for part in tokens.split(sizes, dim=1):
            x, out = part.clone(memory_format=torch.contiguous_format), torch.empty(3, part.shape[1], 100)
            if broken and part.shape[1] > 1:
                x[:, -1] = torch.nan
            step(x, cache, first, out, scratch)
            found.append(out)
        torch.set_num_threads(1)
        return torch.cat(found, dim=1)

    alone = logits([1] * (6 + count))
    assert torch.isfinite(alone).all()
    assert torch.equal(logits([6 + count]), alone)
    assert torch.equal(logits([6, 2, 7, 5, 1], threads=3), alone)
    # A guess that is not finite breaks no token before it.
    assert torch.equal(logits([1] * 13 + [8], broken=True)[:, :-1], alone[:, :-1])


@torch.no_grad()
def rounded_to_int8(gpt: GPT) -> GPT:
    """Round the matrices of a model to int8 precision."""
    for name, weight in gpt.named_parameters():
        if weight.dim() == 2 and "embed" not in name and "adaptive" not in name:
            scale = weight.abs().amax(1, keepdim=True) / 127
            weight.copy_((weight / scale).round() * scale)
    return gpt


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 2e-6), (torch.bfloat16, 0.012)])
@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_logits_equal_those_of_the_model(variant: str, int8: bool, dtype: torch.dtype, allowed: float) -> None:
    gpt = small_gpt(**VARIANTS[variant])
    weights = DecodeWeights.from_gpt(gpt, dtype, int8)
    reference = rounded_to_int8(small_gpt(**VARIANTS[variant])) if int8 else gpt
    condition, lengths, codes = condition_for(gpt, 5), caption_lengths_for(gpt, 5), codes_for(gpt, 5, 15) % 48
    step, cache = CPUStep(weights), KVCache.allocate(gpt.config, 5, dtype=dtype)
    cache.keys.fill_(torch.nan)  # old contents must not be read
    cache.values.fill_(torch.nan)
    first = None if lengths is None else (6 - lengths).int()
    if cache.adaptive is not None:
        cache.adaptive.copy_(gpt.all_adaptive_vectors(gpt.cls_embedding(condition)[:, 0]))
    found, out = [], torch.empty(5, gpt.config.vocab_size)
    with torch.no_grad():
        expected = reference(codes, condition, caption_lengths=lengths)
        tokens = torch.cat([reference.cls_embedding(condition), gpt.tok_embeddings(codes)], dim=1)
        if gpt.config.target_aware:
            tokens[:, -16:] += gpt.target_embedding(torch.arange(16))
        for x in tokens.split([tokens.shape[1] - 15] + [1] * 15, dim=1):
            step(x.clone(memory_format=torch.contiguous_format), cache, first, out, Scratch())
            found.append(out.clone())
    assert (torch.stack(found, dim=1) - expected).norm() / expected.norm() < allowed


def test_int8_weights_are_within_half_a_level_and_zeros_stay_zero() -> None:
    gpt = small_gpt()
    with torch.no_grad():
        gpt.output.weight[3] = 0
    head = DecodeWeights.from_gpt(gpt, torch.float32, int8=True).head
    assert head.scale is not None
    assert head.values.dtype is torch.int8
    assert ((head.values * head.scale[:, None] - gpt.output.weight).abs() <= 0.501 * head.scale[:, None]).all()
    assert int(head.values.max()) == 127
    assert not head.values[3].any()


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
        SamplingConfig(100.0, top_k=3),  # three codes of almost equal probability
        SamplingConfig(1.0, top_k=5000, top_p=1e-9),
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [None, 1.0, 0.0, 3.5])
def test_sampled_codes_equal_those_of_sample_codes(config: SamplingConfig, scale: float | None) -> None:
    batch, vocabulary = 40, 1003
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(batch if scale is None else 2 * batch, vocabulary, generator=generator)
    if scale is None:
        logits[5, 100:] = -torch.inf
    logits[6] = 0.0
    guided = logits if scale is None else scale * logits[:batch] + (1 - scale) * logits[batch:]
    if scale is not None:
        guided = torch.where(torch.tensor(scale == 1.0), logits[:batch], guided)
    rows, indices = torch.arange(batch), torch.arange(batch) * 11
    step = CPUStep(DecodeWeights.from_gpt(small_gpt(), torch.float32))
    seeds = torch.stack([seed_tensor(-7 + 2**63 + row // 2) for row in range(batch)])
    scales = torch.full((batch,), 1.0 if scale is None else scale)
    draws = Draws(rows, rows if scale is None else rows + batch, scales, seeds, indices, torch.full_like(rows, 2))
    codes, broken = step.sample_codes(logits, config, draws, Scratch())
    assert broken.nonzero().flatten().tolist() == ([5] if scale is None else [])
    noise = gumbel(seeds, indices, torch.tensor(2), code_counters(vocabulary))
    assert torch.equal(codes, sample_codes(guided, config, noise))


@pytest.mark.parametrize(
    "config", [SamplingConfig(0.8, 700), SamplingConfig(1.0, 0, 0.7), SamplingConfig(1.3, 700, 0.7)]
)
@pytest.mark.parametrize("levels", [1000.0, 3.0], ids=["distinct", "ties"])
def test_codes_of_a_large_vocabulary_equal_those_of_sample_codes(config: SamplingConfig, levels: float) -> None:
    generator, rows, vocabulary = torch.Generator().manual_seed(2), torch.arange(30), 4099
    logits = (levels * torch.randn(30, vocabulary, generator=generator)).round() / levels
    step, ones = CPUStep(DecodeWeights.from_gpt(small_gpt(), torch.float32)), torch.ones(30)
    found, _ = step.sample_codes(logits, config, Draws(rows, rows, ones, rows, rows, rows), Scratch())
    noise = gumbel(rows, rows, rows, code_counters(vocabulary))
    assert torch.equal(found, sample_codes(logits, config, noise))


def test_a_draw_from_a_row_without_logits_is_an_error() -> None:
    step, row = CPUStep(DecodeWeights.from_gpt(small_gpt(), torch.float32)), torch.tensor([3])
    with pytest.raises(AssertionError, match="names a row"):
        step.sample_codes(
            torch.zeros(3, 48), SamplingConfig(), Draws(row, row, torch.ones(1), row, row, row), Scratch()
        )
