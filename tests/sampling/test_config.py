"""SamplingConfig refuses values without a meaning and counts the guided steps."""

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
    ],
    ids=str,
)
def test_a_value_without_a_meaning_is_refused_by_name_and_value(options: dict[str, Any], phrase: str) -> None:
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
    ],
    ids=str,
)
def test_the_first_codes_are_guided_unless_the_scale_is_one(options: dict[str, Any], guided: int) -> None:
    assert SamplingConfig(**options).guided_steps(16) == guided
