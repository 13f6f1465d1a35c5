"""A sampler returns the codes of uncached sampling: compiled or not, in any batch, from any thread."""

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llamagen.models.gpt import GPT
from llamagen.models.kv_cache import KVCache
from llamagen.sampling import Sampler, SamplingConfig
from llamagen.sampling.decode_weights import DecodeWeights
from tests.sampling.plain import SETTINGS, plain_loop
from tests.small_models import (
    CLASS_GPT,
    GPT_VARIANTS,
    HEAD_VARIANTS,
    RECIPE_VARIANTS,
    caption_lengths_for,
    condition_for,
    small_gpt,
)

VARIANTS = GPT_VARIANTS | HEAD_VARIANTS | RECIPE_VARIANTS


def inputs(gpt: GPT, batch: int) -> tuple[Tensor, Tensor | None, Tensor]:
    return condition_for(gpt, batch), caption_lengths_for(gpt, batch), (torch.arange(batch) * 37 + 4) % 1000


CASES = [(variant, setting) for variant in GPT_VARIANTS for setting in SETTINGS]
CASES += [
    (variant, setting)
    for variant in HEAD_VARIANTS | RECIPE_VARIANTS
    for setting in ("greedy, guided", "sampled, guided", "sampled, linear")
]


@pytest.mark.parametrize(("variant", "setting"), CASES)
def test_compiled_codes_equal_those_of_uncached_sampling(variant: str, setting: str) -> None:
    gpt, config = small_gpt(**VARIANTS[variant]), SamplingConfig(**SETTINGS[setting])
    condition, lengths, indices = inputs(gpt, 5)
    expected = plain_loop(gpt, condition, config, lengths, 11, indices)
    sampler = Sampler(gpt, 3, compiled=True)  # a full batch and one of two
    assert torch.equal(sampler(condition, config, caption_lengths=lengths, seed=11, indices=indices), expected)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", ["class", "text"])
def test_codes_do_not_depend_on_batch_size_or_order(kind: str, compiled: bool) -> None:
    gpt, config = small_gpt(condition=kind), SamplingConfig(0.9, 30, 0.95, 2.0, guidance_steps=9)
    condition, lengths, indices = inputs(gpt, 23)
    expected = plain_loop(gpt, condition, config, lengths, -3, indices)
    for batch_size in (1, 7, 23, 64):
        sampler = Sampler(gpt, batch_size, compiled=compiled)
        found = sampler(condition, config, caption_lengths=lengths, seed=-3, indices=indices)
        assert torch.equal(found, expected)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    lengths = None if lengths is None else lengths[order]
    found = sampler(condition[order], config, caption_lengths=lengths, seed=-3, indices=indices[order])
    assert torch.equal(found, expected[order])


def test_codes_of_a_vocabulary_of_more_than_16_bits_equal_those_of_uncached_sampling() -> None:
    gpt = GPT(replace(CLASS_GPT, dim=8, n_layer=1, n_head=1, vocab_size=2**17, block_size=4)).eval()
    nn.init.normal_(gpt.output.weight, generator=torch.Generator().manual_seed(0))
    labels, config, indices = torch.arange(2), SamplingConfig(0.9, 100_000, 0.95, 2.0), torch.tensor([4, 0])
    expected = plain_loop(gpt, labels, config, None, 11, indices)
    assert int(expected.max()) >= 2**16
    for compiled in (False, True):
        assert torch.equal(Sampler(gpt, 2, compiled=compiled)(labels, config, seed=11, indices=indices), expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_each_image_of_a_batch_may_have_its_own_seed(compiled: bool) -> None:
    sampler, seeds = Sampler(small_gpt(), 3, compiled=compiled), [5, -1, 2**64 + 7, 6]
    found = sampler([1, 2, 0, 1], seed=seeds, indices=[4, 0, 1, 2])
    single = [
        sampler([label], seed=seed, indices=[i])
        for label, seed, i in zip([1, 2, 0, 1], seeds, [4, 0, 1, 2], strict=True)
    ]
    assert torch.equal(found, torch.cat(single))
    assert torch.equal(sampler([1, 2], seed=torch.tensor([7, 7])), sampler([1, 2], seed=7))
    with pytest.raises(ValueError, match="seed has 3 integers for 2 images; give one integer, or one for each image"):
        sampler([1, 2], seed=[1, 2, 3])


def test_a_float32_sampler_reads_the_weights_of_the_model_without_copies() -> None:
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


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_calls_reuse_one_cache(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gpt, allocated = small_gpt(), []
    allocate = KVCache.allocate
    monkeypatch.setattr(KVCache, "allocate", lambda *args: allocated.append(args[1]) or allocate(*args))
    sampler = Sampler(gpt, 4, compiled=compiled)
    for count, scale in ((9, 2.0), (1, 1.0), (4, 3.0)):
        sampler(torch.zeros(count, dtype=torch.int64), SamplingConfig(guidance_scale=scale))
    assert allocated == [8]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_codes_do_not_depend_on_the_default_dtype(compiled: bool) -> None:
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
def test_in_place_changes_of_weights_take_effect(kind: str) -> None:
    def build(gpt: GPT) -> Sampler:
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            return Sampler(gpt, 3, compiled=True, int8=kind == "int8")

    gpt = small_gpt().bfloat16() if kind == "bfloat16" else small_gpt()
    sampler, labels = build(gpt), torch.arange(3)
    before = sampler(labels)
    with torch.no_grad():
        for weight in gpt.parameters():  # norms and matrices
            weight.mul_(-1.5)
    after = sampler(labels)
    assert not torch.equal(after, before)
    assert torch.equal(after, build(gpt)(labels))


def test_rejects_a_model_whose_weights_were_replaced() -> None:
    gpt = small_gpt()
    sampler = Sampler(gpt, 1, compiled=True)
    gpt.load_state_dict({name: value.clone() for name, value in gpt.state_dict().items()}, assign=True)
    with pytest.raises(ValueError, match="its weights were replaced, after the sampler was built; build a new one"):
        sampler(torch.arange(1))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_sampler_built_in_inference_mode_works_outside_of_it(compiled: bool) -> None:
    gpt = small_gpt()
    with torch.inference_mode():
        sampler = Sampler(gpt, 2, compiled=compiled)
        sampler.prepare(SamplingConfig())
    assert torch.equal(sampler(torch.arange(2)), Sampler(gpt, 2)(torch.arange(2)))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_sampler_works_in_inference_mode_and_outside_of_it(compiled: bool) -> None:
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


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 1, "int8": True}, "int8 weights are for compiled sampling"),
    ],
)
def test_rejects_invalid_options(options: dict[str, Any], phrase: str) -> None:
    with pytest.raises(ValueError, match=phrase):
        Sampler(small_gpt(), **options)


def test_rejects_compiling_for_float16_on_a_cpu() -> None:
    with pytest.raises(ValueError, match=r"float32 and bfloat16, not for torch\.float16"):
        Sampler(small_gpt().half(), 1, compiled=True)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", ["class", "text"])
def test_threads_that_share_a_sampler_get_the_codes_of_single_calls(kind: str, compiled: bool, training: bool) -> None:
    gpt = small_gpt(condition=kind, token_dropout=0.5, block_size=25).train(training)
    configs = [SamplingConfig(0.9, 30, 0.95, scale, guidance_steps=9, window=5) for scale in (1.0, 2.0)]
    condition, lengths, indices = inputs(gpt, 5)
    sampler = Sampler(gpt, 3, compiled=compiled)

    def call(seed: int, **changes: int) -> Tensor:
        config = replace(configs[seed % 2], **changes)
        return sampler(condition, config, caption_lengths=lengths, seed=seed, indices=indices)

    expected = [call(seed, window=1) for seed in range(8)]
    found: dict[int, Tensor] = {}
    start = threading.Barrier(4)

    def run(thread: int) -> None:
        start.wait()
        for seed in range(thread, 8, 4):
            found[seed] = call(seed, **({"window": 1} if thread == 0 else {}))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [torch.equal(found[seed], expected[seed]) for seed in range(8)] == [True] * 8
    assert {module.training for module in gpt.modules()} == {training}
