"""Sampling of models with ``code_factors``: one factor after the other, with everything that other models can do."""

from typing import Any

import pytest
import torch

from llamagen.sampling import Sampler, SamplingConfig
from tests.sampling.plain import SETTINGS, plain_loop
from tests.small_models import RECIPE_VARIANTS, caption_lengths_for, codes_for, condition_for, small_gpt

FACTORS = {"code_factors": (6, 8)}
ALL = {**RECIPE_VARIANTS["QK-norm, adaptive norms, target-aware"], "dim": 48, **FACTORS}
CASES = [
    ("greedy, guided for 5 codes", FACTORS, 1),
    ("sampled, guided from code 3 to 9", {**FACTORS, "condition": "text"}, 3),
    ("sampled from all codes", ALL, 4),
]


@pytest.mark.parametrize(("setting", "net", "window"), CASES, ids=[case[0] for case in CASES])
def test_codes_are_those_of_both_distributions_with_their_own_noise(
    setting: str, net: dict[str, Any], window: int
) -> None:
    gpt, options = small_gpt(**net), SETTINGS[setting]
    if "top_k" in options:  # fewer than each factor has
        options = {**options, "top_k": 4}
    condition, lengths, indices = condition_for(gpt, 5), caption_lengths_for(gpt, 5), torch.tensor([4, 0, 77, 1, 9])
    expected = plain_loop(gpt, condition, SamplingConfig(**options), lengths, 11, indices)
    assert len(expected.unique()) > 8
    sampler, rows = Sampler(gpt, 3), list[int]()  # a full batch and one of two
    arguments: dict[str, Any] = {"caption_lengths": lengths, "seed": 11, "indices": indices}
    config = SamplingConfig(**options, window=window)
    found = sampler(condition, config, **arguments, on_row=lambda codes, count, start: rows.append(count))
    assert torch.equal(found, expected)
    assert rows == [4, 8, 12, 16] * 2
    assert torch.equal(sampler(condition, config, **arguments, kept=expected[:, :6]), expected)


def test_codes_may_be_generated_in_any_order() -> None:
    gpt, config = small_gpt(**ALL), SamplingConfig(**SETTINGS["sampled, guided"])
    order = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(seed)) for seed in range(2)])
    kept = codes_for(gpt, 2, 3)
    expected = plain_loop(gpt, torch.arange(2), config, None, 5, torch.arange(2), kept, order)
    found = Sampler(gpt, 2)(torch.arange(2), config, seed=5, kept=kept, order=order)
    assert torch.equal(found.gather(1, order), expected)


@pytest.mark.parametrize("window", [1, 3])
def test_a_second_head_that_overflows_is_named(window: int) -> None:
    gpt = small_gpt(**FACTORS)
    with torch.no_grad():
        gpt.get_parameter("second_factor.output.weight").fill_(3e38)
    with pytest.raises(FloatingPointError, match=r"the output of layer second_factor\.output is the first that is not"):
        Sampler(gpt, 2)(torch.arange(2), SamplingConfig(window=window))
