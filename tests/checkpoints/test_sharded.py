"""Sharded checkpoints have the layout of single files; code named by their index is never run."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamagen.checkpoints.sharded import not_moments, numbered, read_sharded


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self.victim}",)


def test_never_runs_code_of_an_index(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Hostile(tmp_path / "victim")))
    with pytest.raises(ValueError, match=r"is refused: it needs posix\.system, ") as error:
        read_sharded(tmp_path, {}, not_moments)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "victim").exists()


def test_parameters_are_numbered_through_all_groups() -> None:
    groups = [{"params": ["wo", "wqkv"], "lr": 0.1}, {"params": ["norm"], "lr": 0.2}]
    found = numbered({"state": {"norm": {"ema": 3}, "wo": {"ema": 1}, "wqkv": {"ema": 2}}, "param_groups": groups})
    assert found["state"] == {0: {"ema": 1}, 1: {"ema": 2}, 2: {"ema": 3}}
    assert found["param_groups"] == [{"params": [0, 1], "lr": 0.1}, {"params": [2], "lr": 0.2}]
