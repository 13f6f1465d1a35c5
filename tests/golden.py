"""Reference values of the published implementation, and the rules that made their weights and inputs.

``fixtures/golden.json``, ``fixtures/state_dict_keys.json`` and ``fixtures/inception.json`` (of torch-fidelity) hold
numbers that the published code computed in float32 on a CPU. Weights are filled by name (:func:`fill`), inputs are
drawn by name (:func:`normal_input`, :func:`integer_input`), so neither has to be stored.
"""

import json
import zlib
from collections.abc import Sequence
from functools import cache
from math import sqrt
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

FIXTURES = Path(__file__).parent / "fixtures"
SALT = "A-"
UNFILLED = ("running_mean", "running_var", "num_batches_tracked", "codebook_used", ".f")

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@cache
def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FIXTURES / name).read_text())
    return content


def golden(entry: str, file: str = "golden.json") -> dict[str, Any]:
    """What is recorded under ``entry`` of a file."""
    record: dict[str, Any] = _read(file)[entry]
    return record


def published_state_dict(model: str) -> tuple[int, dict[str, tuple[str, tuple[int, ...]]]]:
    """Parameter count of a published model, and dtype and shape of every entry of its state dict by name."""
    record = _read("state_dict_keys.json")[model]
    return record["parameters"], {name: (dtype, tuple(shape)) for name, (dtype, shape) in record["keys"].items()}


def _generator(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32((SALT + name).encode()))


def normal_input(name: str, shape: Sequence[int]) -> Tensor:
    """A standard normal input, float32, that depends on nothing but its name and shape."""
    return torch.from_numpy(_generator(name).standard_normal(tuple(shape)).astype(np.float32))


def integer_input(name: str, high: int, shape: Sequence[int]) -> Tensor:
    """Integers in [0, high), int64, that depend on nothing but name, bound and shape."""
    return torch.from_numpy(_generator(name).integers(0, high, tuple(shape)))


@torch.no_grad()
def fill(module: ModuleT) -> ModuleT:
    """Overwrite every parameter and buffer by the fill rule, in place; gives the module back."""
    for name, entry in module.state_dict().items():
        if name.endswith(UNFILLED):
            continue
        values = normal_input(name, entry.shape)
        if entry.dim() >= 2:
            values /= sqrt(entry.numel() / entry.shape[0])
        elif name.endswith("weight"):
            values = 1 + 0.1 * values
        else:
            values *= 0.02
        entry.copy_(values)
    return module


def assert_matches(tensor: Tensor, record: dict[str, Any], tolerance: float = 1e-4) -> None:
    """Compare a tensor with its record: shape, 16 values, mean, standard deviation and absolute maximum."""
    assert list(tensor.shape) == record["shape"]
    found = tensor.detach().double().flatten()
    values = torch.tensor(record["values"], dtype=torch.float64)
    torch.testing.assert_close(found[record["at"]], values, atol=tolerance, rtol=0)
    for name, value in (("mean", found.mean()), ("std", found.std()), ("absmax", found.abs().max())):
        assert abs(value.item() - record[name]) <= tolerance, f"{name} is {value.item()}, published {record[name]}"
