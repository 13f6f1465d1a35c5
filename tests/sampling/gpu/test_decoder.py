"""On a GPU a compiled sampler returns the codes of uncached sampling, and does not wait for the device."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llamagen.sampling import PixelDecoder, Sampler, SamplingConfig
from llamagen.sampling.inputs import SamplingRequest
from tests.sampling.plain import SETTINGS, plain_loop
from tests.small_models import (
    GPT_VARIANTS,
    RECIPE_VARIANTS,
    caption_lengths_for,
    codes_for,
    condition_for,
    small_gpt,
    small_vqgan,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
VARIANTS = {
    **GPT_VARIANTS,
    "class, QK-norm, target-aware": {"qk_norm": True, "target_aware": True},
    "text, QK-norm, target-aware": RECIPE_VARIANTS["QK-norm, target-aware, text"],
}
CASES = [("class", setting) for setting in SETTINGS]
CASES += [(variant, setting) for variant in VARIANTS for setting in ("greedy, guided", "sampled, linear")]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("variant", "setting"), CASES)
def test_codes_equal_those_of_uncached_sampling(variant: str, setting: str, compiled: bool) -> None:
    cpu, config = small_gpt(**VARIANTS[variant]), SamplingConfig(**SETTINGS[setting])
    condition, lengths, indices = condition_for(cpu, 5), caption_lengths_for(cpu, 5), torch.arange(5) * 37
    expected = plain_loop(cpu, condition, config, lengths, 11, indices)
    sampler = Sampler(small_gpt(**VARIANTS[variant]).to("cuda"), 3, compiled=compiled)
    lengths = None if lengths is None else lengths.cuda()
    for _ in range(2):  # the second call reuses graphs and memory
        found = sampler(condition.cuda(), config, caption_lengths=lengths, seed=11, indices=indices.cuda())
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("kind", ["class", "text"])
def test_float32_codes_do_not_depend_on_the_batch_size(kind: str) -> None:
    gpt, config = small_gpt(condition=kind).to("cuda"), SamplingConfig(0.9, 30, 0.95, 2.0, guidance_steps=9)
    cpu = small_gpt(condition=kind)
    condition, lengths = condition_for(cpu, 64).cuda(), caption_lengths_for(cpu, 64)
    lengths = None if lengths is None else lengths.cuda()
    codes = [Sampler(gpt, size, compiled=True)(condition, config, caption_lengths=lengths) for size in (1, 7, 64)]
    assert torch.equal(codes[0], codes[1])
    assert torch.equal(codes[0], codes[2])


@pytest.mark.parametrize("setting", ["greedy, guided", "sampled, guided from code 3 to 9", "sampled by top-k alone"])
@pytest.mark.parametrize("kind", ["class", "text"])
def test_float32_codes_do_not_depend_on_the_window(kind: str, setting: str) -> None:
    cpu, config = small_gpt(condition=kind), SamplingConfig(**SETTINGS[setting])
    condition, lengths, indices = condition_for(cpu, 5), caption_lengths_for(cpu, 5), torch.arange(5) * 37
    sampler = Sampler(small_gpt(condition=kind).to("cuda"), 3, compiled=True)
    for count in (0, 6):
        kept = codes_for(cpu, 5, count) if count else None
        expected = plain_loop(cpu, condition, config, lengths, 11, indices, kept)
        for window in (1, 2, 7, 40, "auto", 2):
            found = sampler(
                condition,
                replace(config, window=window),
                caption_lengths=lengths,
                seed=11,
                indices=indices,
                kept=kept,
            )
            assert torch.equal(found.cpu(), expected), window


@pytest.mark.parametrize("window", [4, 16])
def test_windows_in_bfloat16(window: int) -> None:
    gpt, labels = small_gpt().to("cuda"), torch.arange(64, device="cuda") % 7
    with torch.autocast("cuda", torch.bfloat16):
        sampler = Sampler(gpt, 64, compiled=True)
    config = SamplingConfig(guidance_scale=2.0)
    codes, expected = sampler(labels, replace(config, window=window)), sampler(labels, config)
    assert (codes == expected)[:, 1:4].float().mean() > 0.7  # rounding changes few codes; code 0 has no window


def test_settings_seeds_and_batch_sizes_may_change_between_calls() -> None:
    gpt, cpu = small_gpt().to("cuda"), small_gpt()
    sampler = Sampler(gpt, 4, compiled=True)
    calls: list[tuple[int, int, dict[str, Any]]] = [
        (4, 0, {}), (2, 5, {"guidance_scale": 3.0}), (4, 5, {"guidance_scale": 1.5, "top_k": 4}), (1, 0, {}),
    ]  # fmt: skip
    for count, seed, options in calls:
        labels, config = torch.arange(count), SamplingConfig(**options)
        expected = plain_loop(cpu, labels, config, None, seed, torch.arange(count))
        assert torch.equal(sampler(labels.cuda(), config, seed=seed).cpu(), expected)


def test_a_sampler_built_in_inference_mode_works_outside_of_it() -> None:
    gpt, labels = small_gpt().to("cuda"), torch.arange(4, device="cuda")
    with torch.inference_mode():
        sampler = Sampler(gpt, 4, compiled=True)
        sampler.prepare(SamplingConfig(guidance_scale=2.0))
        inside = sampler(labels, SamplingConfig(guidance_scale=2.0))
    assert torch.equal(sampler(labels, SamplingConfig(guidance_scale=2.0)), inside)


def test_in_place_changes_of_weights_take_effect() -> None:
    gpt, labels = small_gpt().to("cuda"), torch.arange(4, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        sampler = Sampler(gpt, 4, compiled=True)
    before = sampler(labels)
    with torch.no_grad():
        for weight in gpt.parameters():
            weight.mul_(-1.5)
    assert not torch.equal(sampler(labels), before)


@pytest.mark.parametrize("window", [1, 4])
def test_decoding_needs_no_synchronization(window: int) -> None:
    # With windows the host waits for an event of an earlier pass, and never for the whole device.
    sampler = Sampler(small_gpt().to("cuda"), 4, compiled=True)
    labels, config = (
        torch.arange(4, device="cuda"),
        SamplingConfig(guidance_scale=2.0, guidance_steps=5, top_k=9, window=window),
    )
    expected = sampler(labels, config, seed=3)
    decoder, request = sampler.decoder, SamplingRequest.from_inputs(sampler.gpt, labels, config, None, 3, None)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            found = decoder(request).codes
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("setting", ["sampled, guided", "sampled, guided from code 3 to 9"])
@pytest.mark.parametrize("kind", ["class", "text"])
def test_codes_after_kept_ones_equal_those_of_uncached_sampling(kind: str, setting: str, compiled: bool) -> None:
    cpu, config = small_gpt(condition=kind), SamplingConfig(**SETTINGS[setting])
    condition, lengths, indices = condition_for(cpu, 5), caption_lengths_for(cpu, 5), torch.arange(5) * 37
    sampler = Sampler(small_gpt(condition=kind).to("cuda"), 3, compiled=compiled)
    for count in (1, 4, 9, 16, 0):
        kept, counts = codes_for(cpu, 5, count), list[tuple[int, int]]()
        expected = plain_loop(cpu, condition, config, lengths, 11, indices, kept)

        def watch(codes: Tensor, complete: int, start: int, expected: Tensor = expected) -> None:
            counts.append((complete, start))  # noqa: B023
            assert torch.equal(codes[:, :complete].cpu(), expected[start : start + len(codes), :complete])

        found = sampler(condition, config, caption_lengths=lengths, seed=11, indices=indices, kept=kept, on_row=watch)
        assert torch.equal(found.cpu(), expected)
        first = max(4, count // 4 * 4)
        assert counts == [(complete, start) for start in (0, 3) for complete in range(first, 17, 4)]


def test_a_compiled_sampler_works_after_its_callback_has_raised() -> None:
    sampler, labels = Sampler(small_gpt().to("cuda"), 4, compiled=True), torch.arange(4)
    config = SamplingConfig(guidance_scale=2.0)
    expected = sampler(labels, config)

    def stop(codes: Tensor, count: int, start: int) -> None:
        if count == 8:
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        sampler(labels, config, on_row=stop)
    assert torch.equal(sampler(labels, config), expected)


@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
def test_bfloat16_under_autocast(int8: bool) -> None:
    gpt = small_gpt().to("cuda")
    with torch.autocast("cuda", torch.bfloat16):
        sampler = Sampler(gpt, 8, compiled=True, int8=int8)
    codes = sampler(torch.arange(8, device="cuda") % 7, SamplingConfig(0.0, guidance_scale=2.0))
    expected = Sampler(gpt, 8)(torch.arange(8, device="cuda") % 7, SamplingConfig(0.0, guidance_scale=2.0))
    assert (codes == expected)[:, 0].float().mean() > 0.7  # the first code has no history that could differ


def test_pixels_are_decoded_on_a_stream_of_their_own() -> None:
    vqgan, codes = small_vqgan(), torch.randint(64, (5, 4, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = PixelDecoder(vqgan, torch.device("cpu"), torch.float32)(codes).numpy().astype(int)
    pixels = PixelDecoder(small_vqgan(), torch.device("cuda"), torch.float32)
    images = pixels(codes.cuda())
    assert abs(images.numpy().astype(int) - expected).max() <= 1
    assert abs(images.tensor().cpu().numpy().astype(int) - expected).max() <= 1
