"""Greedy decoding gives the published sequences, token for token."""

import pytest

from llamagen.sampling import Sampler, SamplingConfig, generate
from tests.golden import golden
from tests.golden_gpts import SMALL_ENTRIES, golden_gpt, golden_inputs


@pytest.mark.parametrize(("scale", "window"), [("1.0", 1), ("1.0", 8), ("1.75", 1), ("4.0", 1), ("4.0", 3)])
@pytest.mark.parametrize("entry", SMALL_ENTRIES)
def test_greedy_codes_are_the_published_ones(entry: str, scale: str, window: int) -> None:
    gpt = golden_gpt(entry)
    condition, caption_lengths = golden_inputs(entry, gpt.config)
    config = SamplingConfig(temperature=0.0, guidance_scale=float(scale), window=window)
    codes = generate(gpt, condition, config, caption_lengths=caption_lengths)
    assert codes.tolist() == golden(entry)["greedy"][scale]


@pytest.mark.parametrize("entry", SMALL_ENTRIES)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_windows_give_the_published_codes_with_guidance_on_the_first_half(entry: str, compiled: bool) -> None:
    gpt = golden_gpt(entry)
    condition, caption_lengths = golden_inputs(entry, gpt.config)
    guided_steps = gpt.config.block_size // 2 + 2
    config = SamplingConfig(temperature=0.0, guidance_scale=3.0, guidance_steps=guided_steps, window=5)
    codes = Sampler(gpt, 8, compiled=compiled)(condition, config, caption_lengths=caption_lengths)
    assert codes.tolist() == golden(entry)["greedy_cfg3_interval_half"]


@pytest.mark.parametrize("entry", SMALL_ENTRIES)
def test_greedy_codes_with_guidance_on_the_first_half_are_the_published_ones(entry: str) -> None:
    gpt = golden_gpt(entry)
    condition, caption_lengths = golden_inputs(entry, gpt.config)
    config = SamplingConfig(temperature=0.0, guidance_scale=3.0, guidance_steps=gpt.config.block_size // 2 + 2)
    codes = generate(gpt, condition, config, caption_lengths=caption_lengths)
    assert codes.tolist() == golden(entry)["greedy_cfg3_interval_half"]
    unlimited = generate(gpt, condition, SamplingConfig(0.0, guidance_scale=3.0), caption_lengths=caption_lengths)
    assert not codes.equal(unlimited)
