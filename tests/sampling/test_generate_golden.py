"""Greedy decoding gives the published sequences, token for token."""

import pytest

from llamagen.sampling import SamplingConfig, generate
from tests.golden import golden
from tests.golden_gpts import SMALL_ENTRIES, golden_gpt, golden_inputs


@pytest.mark.parametrize("scale", ["1.0", "1.75", "4.0"])
@pytest.mark.parametrize("entry", SMALL_ENTRIES)
def test_greedy_codes_are_the_published_ones(entry: str, scale: str) -> None:
    gpt = golden_gpt(entry)
    condition, caption_lengths = golden_inputs(entry, gpt.config)
    config = SamplingConfig(temperature=0.0, guidance_scale=float(scale))
    codes = generate(gpt, condition, config, caption_lengths=caption_lengths)
    assert codes.tolist() == golden(entry)["greedy"][scale]


@pytest.mark.parametrize("entry", SMALL_ENTRIES)
def test_greedy_codes_with_guidance_on_the_first_half_are_the_published_ones(entry: str) -> None:
    gpt = golden_gpt(entry)
    condition, caption_lengths = golden_inputs(entry, gpt.config)
    config = SamplingConfig(temperature=0.0, guidance_scale=3.0, guidance_steps=gpt.config.block_size // 2 + 2)
    codes = generate(gpt, condition, config, caption_lengths=caption_lengths)
    assert codes.tolist() == golden(entry)["greedy_cfg3_interval_half"]
    unlimited = generate(gpt, condition, SamplingConfig(0.0, guidance_scale=3.0), caption_lengths=caption_lengths)
    assert not codes.equal(unlimited)
