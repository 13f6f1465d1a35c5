"""Sampling keeps given codes exactly and continues as if it had sampled them itself."""

from typing import Any

import pytest
import torch
from torch import Tensor

from llamagen.models.gpt import GPT
from llamagen.sampling import ImageSampler, Sampler, SamplingConfig, decoder, generate
from llamagen.sampling.inputs import SamplingRequest
from tests.sampling.plain import SETTINGS, plain_loop
from tests.small_models import RECIPE_VARIANTS, caption_lengths_for, codes_for, condition_for, small_gpt, small_vqgan

ENGINES = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
GUIDED = ("sampled, guided", "sampled, guided from code 3 to 9", "sampled, guided for no code", "sampled, linear")
BATCH = 3


def inputs(gpt: GPT) -> tuple[Tensor, Tensor | None, Tensor]:
    return condition_for(gpt, BATCH), caption_lengths_for(gpt, BATCH), torch.arange(BATCH) * 37 + 4


@ENGINES
@pytest.mark.parametrize("count", [1, 2, 4, 9, 13, 15])
@pytest.mark.parametrize("setting", GUIDED)
@pytest.mark.parametrize("kind", ["class", "text"])
def test_codes_after_kept_ones_equal_those_of_uncached_sampling(
    kind: str, setting: str, count: int, compiled: bool
) -> None:
    gpt, config = small_gpt(condition=kind), SamplingConfig(**SETTINGS[setting])
    (condition, lengths, indices), kept = inputs(gpt), codes_for(small_gpt(), BATCH, count)
    found = Sampler(gpt, 2, compiled=compiled)(
        condition, config, caption_lengths=lengths, seed=11, indices=indices, kept=kept
    )
    assert torch.equal(found[:, :count], kept)
    assert torch.equal(found, plain_loop(gpt, condition, config, lengths, 11, indices, kept))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("kind", ["class", "text", "options"])
def test_keeping_codes_of_a_compiled_image_gives_the_image_again_in_any_batch(kind: str, precision: str) -> None:
    options = RECIPE_VARIANTS["QK-norm, adaptive norms, target-aware"]
    gpt = small_gpt(**options) if kind == "options" else small_gpt(condition=kind, dim=144, n_head=3)
    config = SamplingConfig(0.9, 30, 0.95, 2.0, guidance_steps=9)
    condition, lengths, indices = inputs(gpt)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        samplers = [Sampler(gpt, size, compiled=True, int8=precision == "int8") for size in (1, 2, 8)]
    expected = samplers[0](condition, config, caption_lengths=lengths, seed=3, indices=indices)
    for count in range(17):
        found = samplers[count % 3](
            condition, config, caption_lengths=lengths, seed=3, indices=indices, kept=expected[:, :count]
        )
        assert torch.equal(found, expected), count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_codes_read_in_passes_of_any_size_have_the_bits_of_codes_one_by_one(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpt, codes = small_gpt(condition="text", dim=144, n_head=3), codes_for(small_gpt(), BATCH, 12)
    condition, lengths, _ = inputs(gpt)
    request = SamplingRequest.from_inputs(gpt, condition, None, lengths, 0, None)
    engine, found = decoder_of(gpt, dtype), list[Tensor]()
    with torch.no_grad(), engine.start(request) as state:
        state.prefill()
        alone = [state.decode(code[:, None]).clone() for code in codes.unbind(1)][-1]
    for most in (2048, 15, 1):
        monkeypatch.setattr(decoder, "MAX_PASS_TOKENS", most)
        with torch.no_grad(), engine.start(request) as state:
            state.prefill()
            state.keep(codes)
            assert state.cache.length == 6 + 11
            found.append(state.decode(codes[:, -1:]).clone())
    assert all(torch.equal(logits, alone) for logits in found)


def decoder_of(gpt: GPT, dtype: torch.dtype) -> decoder.CodeDecoder:
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        return Sampler(gpt, BATCH, compiled=True).decoder


@ENGINES
def test_keeping_all_codes_needs_no_pass(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gpt, kept, seen = small_gpt(), codes_for(small_gpt(), BATCH, 16), list[tuple[int, int]]()
    sampler = Sampler(gpt, 2, compiled=compiled)
    monkeypatch.setattr(sampler.decoder, "start", lambda _: pytest.fail("a model pass"))
    found = sampler(torch.arange(BATCH), kept=kept, on_row=lambda codes, count, start: seen.append((count, start)))
    assert torch.equal(found, kept)
    assert found.data_ptr() != kept.data_ptr()
    assert seen == [(16, 0), (16, 2)]


@pytest.mark.parametrize(("count", "rows"), [(4, 6), (5, 3), (9, 3)])
def test_the_unconditional_branch_is_computed_only_if_a_new_code_is_guided(count: int, rows: int) -> None:
    gpt, config = small_gpt(), SamplingConfig(guidance_scale=2.0, guidance_steps=5)
    kept = codes_for(gpt, BATCH, count)
    request = SamplingRequest.from_inputs(gpt, torch.arange(BATCH), config, None, 0, None, kept)
    with Sampler(gpt, BATCH).decoder.start(request) as state:
        assert state.rows == rows


def test_no_kept_codes_are_the_default_and_lists_are_accepted() -> None:
    gpt, labels = small_gpt(), torch.arange(2)
    expected = generate(gpt, labels, seed=2)
    assert torch.equal(generate(gpt, labels, seed=2, kept=torch.empty(2, 0, dtype=torch.int64)), expected)
    assert torch.equal(generate(gpt, labels, seed=2, kept=expected[:, :5].tolist()), expected)
    assert generate(gpt, [], kept=torch.empty(0, 5, dtype=torch.int64)).shape == (0, 16)


def test_an_image_sampler_keeps_codes_of_all_its_batches() -> None:
    gpt, vqgan, labels = small_gpt(vocab_size=64), small_vqgan(), torch.arange(BATCH)
    sampler, config = ImageSampler(gpt, vqgan, 2), SamplingConfig(guidance_scale=2.0)
    generated, codes = sampler(labels, config, seed=5)
    again, found = sampler(labels, config, seed=5, kept=codes[:, :8])
    assert torch.equal(found, codes)
    assert torch.equal(again.tensor(), generated.tensor())
    kept = codes_for(gpt, BATCH, 16)
    reconstructed, found = sampler(labels, config, seed=5, kept=kept)
    assert torch.equal(found, kept)
    assert torch.equal(reconstructed.tensor(), sampler.pixels(kept.unflatten(1, (4, 4))).tensor())


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (torch.zeros(2, dtype=torch.int64), r"kept must have shape (2, K), the first K codes of each image"),
        (torch.zeros(3, 4, dtype=torch.int64), "in raster order, not (3, 4)"),
        (torch.zeros(2, 4, 4, dtype=torch.int64), "in raster order, not (2, 4, 4)"),
        (torch.zeros(2, 17, dtype=torch.int64), "kept has 17 codes for each image, but the model's images have 16"),
        (torch.tensor([[0], [48]]), "kept holds code 48, but the model has codes 0 to 47; encode the images with the"),
        (torch.tensor([[0], [-1]]), "kept holds code -1"),
        (torch.zeros(2, 4), "kept must be integers, not torch.float32"),
        ("codes", "kept must be numbers in a tensor, an array or a list"),
    ],
)
def test_rejects_kept_codes_that_do_not_fit(kept: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        generate(small_gpt(), torch.arange(2), kept=kept)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
