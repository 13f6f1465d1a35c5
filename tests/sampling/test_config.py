"""SamplingConfig rejects invalid values, computes guidance scales and counts guided steps."""

import math
from typing import Any

import pytest

from llamagen.sampling import SamplingConfig


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1.0"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_steps": -3}, "guidance_steps is -3"),
        ({"guidance_start": -1}, "guidance_start is -1"),
        ({"guidance_schedule": "quadratic"}, "guidance_schedule is 'quadratic'"),
        ({"guidance_power": 0.0}, "guidance_power is 0.0"),
        ({"guidance_power": float("nan")}, "guidance_power is nan"),
    ],
    ids=str,
)
def test_rejects_invalid_settings_with_name_and_value(options: dict[str, Any], phrase: str) -> None:
    with pytest.raises(ValueError) as error:
        SamplingConfig(**options)
    assert phrase in str(error.value)


@pytest.mark.parametrize(
    ("options", "guided"),
    [
        ({}, 0),
        ({"guidance_scale": 1.0, "guidance_steps": 5}, 0),
        ({"guidance_scale": 2.0}, 16),
        ({"guidance_scale": 0.0}, 16),
        ({"guidance_scale": 0.5}, 16),
        ({"guidance_scale": 2.0, "guidance_steps": 0}, 0),
        ({"guidance_scale": 2.0, "guidance_steps": 1}, 1),
        ({"guidance_scale": 2.0, "guidance_steps": 16}, 16),
        ({"guidance_scale": 2.0, "guidance_steps": 99}, 16),
        ({"guidance_scale": 2.0, "guidance_start": 3}, 16),
        ({"guidance_scale": 2.0, "guidance_start": 3, "guidance_steps": 9}, 9),
        ({"guidance_scale": 2.0, "guidance_start": 9, "guidance_steps": 9}, 0),
        ({"guidance_scale": 2.0, "guidance_start": 16}, 0),
        ({"guidance_scale": 2.0, "guidance_schedule": "linear"}, 16),
        ({"guidance_scale": 2.0, "guidance_schedule": "linear", "guidance_steps": 1}, 0),  # the first has scale 1
        ({"guidance_scale": 2.0, "guidance_schedule": "power_cosine", "guidance_steps": 7}, 7),
    ],
    ids=str,
)
def test_guided_steps_counts_the_leading_codes_that_need_both_branches(options: dict[str, Any], guided: int) -> None:
    assert SamplingConfig(**options).guided_steps(16) == guided


def scales(**options: Any) -> list[float]:
    return SamplingConfig(**options).guidance_scales(8)


def test_schedules_rise_from_one_to_the_scale() -> None:
    s = 5.0
    assert scales(guidance_scale=s) == [5.0] * 8
    assert scales(guidance_scale=s, guidance_schedule="linear") == pytest.approx([1 + 4 * t / 8 for t in range(8)])
    cosine = [1 + 4 * (1 - math.cos(math.pi * t / 8)) / 2 for t in range(8)]
    assert scales(guidance_scale=s, guidance_schedule="cosine") == pytest.approx(cosine)
    power = [1 + 4 * (1 - math.cos(math.pi * (t / 8) ** 2.5)) / 2 for t in range(8)]
    found = scales(guidance_scale=s, guidance_schedule="power_cosine", guidance_power=2.5)
    assert found == pytest.approx(power)
    assert scales(guidance_scale=s, guidance_schedule="power_cosine", guidance_power=1.0) == pytest.approx(cosine)
    assert found[0] == 1.0
    assert found == sorted(found)


def test_only_the_interval_is_guided() -> None:
    options: dict[str, Any] = {"guidance_scale": 3.0, "guidance_start": 2, "guidance_steps": 5}
    assert scales(**options) == [1.0, 1.0, 3.0, 3.0, 3.0, 1.0, 1.0, 1.0]
    linear = scales(**options, guidance_schedule="linear")
    assert linear == [
        1.0,
        1.0,
        1.5,
        1.75,
        2.0,
        1.0,
        1.0,
        1.0,
    ]  # the schedule counts all codes, not those of the interval
