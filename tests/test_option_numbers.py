"""Configs reject invalid numbers in one line with the option's name."""

from dataclasses import MISSING, fields
from typing import Any, get_type_hints

import pytest

from lightning_modules import AdamWConfig, VQGANLossConfig
from lightning_modules.argen_config import ARGenLossConfig
from llamagen.models.gpt_config import GPTConfig
from llamagen.models.vqgan import VQGANConfig
from llamagen.option_checks import check_integer, check_not_negative
from llamagen.sampling import SamplingConfig

NAN, INF = float("nan"), float("inf")
NEEDED: dict[type, dict[str, Any]] = {GPTConfig: {"dim": 32, "n_layer": 2, "n_head": 4}}
CONFIGS = [GPTConfig, VQGANConfig, SamplingConfig, AdamWConfig, VQGANLossConfig, ARGenLossConfig]


@pytest.mark.parametrize("config", CONFIGS)
def test_all_options_reject_invalid_numbers(config: Any) -> None:
    hints, tried = get_type_hints(config), 0
    for field in fields(config):
        kind = str(hints[field.name])
        if "int" not in kind and "float" not in kind:
            continue
        bad: list[Any] = [-1, NAN, INF, *([2.5] if kind in ("<class 'int'>", "int | None") else [])]
        if kind.startswith("tuple"):
            length = 1 if "..." in kind else 2
            bad = [(), *((value,) * length for value in bad)] + ([(0.9,), (0.9,) * 3] if length == 2 else [])
        for value in bad:
            with pytest.raises(ValueError) as error:
                config(**{**NEEDED.get(config, {}), field.name: value})
            said = str(error.value)
            assert field.name in said, (field.name, value, said)
            assert "\n" not in said
            tried += 1
        assert field.default is not MISSING or field.name in NEEDED[config]
    assert tried >= 6


@pytest.mark.parametrize("value", [1, 7, 2**40])
def test_accepts_integers(value: int) -> None:
    check_integer("n", value)


def test_distinguishes_non_integers_from_small_values() -> None:
    for bad, said in (
        (0, "must be at least 1"),
        (1.5, "must be an integer of at least 1"),
        ("3", "an integer"),
        (True, "an integer"),
    ):
        with pytest.raises(ValueError, match=f"^n is {bad!r}; it .*{said}"):
            check_integer("n", bad)
    check_not_negative("x", 0.0)
    for number in (-1e-9, NAN, INF):
        with pytest.raises(ValueError, match=f"^x is {number}; it must be at least 0"):
            check_not_negative("x", number)
