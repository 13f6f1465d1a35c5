"""Differences between state dicts are listed, and checksums never change."""

import torch
from torch import Tensor

from llamagen.state_dicts import MAX_LISTED, differences, tensors_checksum


def tensors() -> dict[str, Tensor]:
    return {"b": torch.arange(6.0).view(2, 3).T, "a": torch.tensor(1 / 3), "c": torch.tensor([1, 2])}


def test_equal_state_dicts_have_no_differences() -> None:
    assert differences(tensors(), tensors()) == ""


def test_every_kind_of_difference_is_listed() -> None:
    loaded = {"a": torch.tensor(1), "d": torch.ones(1), "b": torch.ones(2, 2)}
    assert differences(loaded, tensors()) == (
        "missing: c; unexpected: d; not floating-point: a (int64); shape mismatch: b is (2, 2), expected (3, 2)"
    )


def test_long_lists_are_cut() -> None:
    names = [f"layer{index:03}" for index in range(MAX_LISTED + 5)]
    listed = differences({}, dict.fromkeys(names, torch.ones(1)))
    assert listed == f"missing: {', '.join(names[:MAX_LISTED])} and 5 more"


def test_checksums_of_state_dicts_never_change() -> None:
    assert tensors_checksum(tensors()) == "c4ae3a434e666b1f208d0f2b775a2b8f1a30ef61e8d9e74cf278927f836f0ab1"


def test_checksums_of_parameters_never_change() -> None:
    parameters = {name: value for name, value in tensors().items() if name != "c"}
    assert tensors_checksum(parameters) == "93923a63eb5b0df21bbc2c37e179bc504be7c0d390526359a6fc9b002e939155"
    rounded = "242eef33f9f855c07960e26ae0f327bac8c5200410931ddaec6799150e0508a4"
    assert tensors_checksum(parameters, torch.bfloat16) == rounded
    assert tensors_checksum({name: value.bfloat16() for name, value in parameters.items()}) == rounded


def test_the_checksum_depends_on_names_and_values_but_not_on_order_or_layout() -> None:
    expected = tensors_checksum(tensors())
    assert tensors_checksum(dict(reversed(tensors().items()))) == expected
    assert tensors_checksum({name: value.contiguous() for name, value in tensors().items()}) == expected
    assert tensors_checksum({**tensors(), "a": torch.tensor(0.5)}) != expected
    assert tensors_checksum({("z" if name == "a" else name): value for name, value in tensors().items()}) != expected
