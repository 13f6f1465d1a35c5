"""Values that are not finite are detected, with the weight or layer that they come from."""

import pytest
import torch
from torch import Tensor, nn

from llamagen.finite import (
    FiniteCheck,
    broken_weight,
    check_finite,
    find_source,
    is_finite,
    not_finite,
    not_finite_error,
)

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_detects_single_values_and_accepts_large_ones(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    values = torch.full((4, 3, 5, 2), most, dtype=dtype).to(memory_format=torch.channels_last)
    assert not_finite(values).tolist() == [False] * 4
    assert is_finite(values)
    values[1, 2, 4, 1], values[3, 0, 0, 0] = NAN, -INF
    assert not_finite(values).tolist() == [False, True, False, True]
    assert not is_finite(values)
    assert not_finite(torch.tensor([1.0, NAN], dtype=dtype)).tolist() == [False, True]


def test_values_that_overflow_in_another_dtype_are_not_finite_in_it() -> None:
    assert is_finite(torch.tensor([1e5]))
    assert not is_finite(torch.tensor([1e5]), torch.float16)
    assert is_finite(torch.tensor([1e5]), torch.int64)
    assert not is_finite(torch.tensor([1e300], dtype=torch.float64), torch.float32)


def test_integers_empty_and_meta_tensors_are_finite() -> None:
    for tensor in (torch.tensor([1]), torch.empty(0), torch.empty(3, device="meta"), torch.tensor(True)):
        assert is_finite(tensor)


class Two(nn.Module):
    """Two layers with a multiplication between them, which is no layer and may overflow."""

    def __init__(self, between: float = 1.0) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Linear(2, 2), nn.Linear(2, 2), between
        self.register_buffer("table", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x) * self.between)
        return y


def test_the_source_is_a_weight_or_the_first_layer() -> None:
    model, x = Two(), torch.ones(1, 2)
    assert broken_weight(model) is None
    assert find_source(model, lambda: model(x)) == ""
    with torch.no_grad():
        model.second.weight.fill_(3e38)
        model.first.weight.fill_(3e38)
    assert find_source(model, lambda: model(x)) == "the output of layer first is the first that is not finite"
    assert find_source(model, lambda: model(x * NAN)) == "the input of layer first is the first that is not finite"
    broken = Two(INF)
    assert (
        find_source({"a": broken}, lambda: broken(x)) == "the input of layer a.second is the first that is not finite"
    )
    model.table[1] = NAN
    assert find_source(model) == f"weight {broken_weight(model)} is not finite" == "weight table is not finite"
    assert not model.first._forward_hooks


def test_the_error_is_one_line_with_examples_place_precision_and_advice() -> None:
    assert str(not_finite_error("the latent is", "32-true", where=" in test, batch 2")) == (
        "the latent is not finite in test, batch 2 (precision 32-true); use 32-true (float32), or weights of an "
        "earlier checkpoint"
    )
    half = str(not_finite_error("they are", "16-true", "weight a is not finite", [3, 5], 8))
    assert half.startswith("they are not finite in 2 of 8 examples (first: number 3) (precision 16-true): weight a is")
    assert "use bf16-mixed or 32-true (bfloat16 or float32) and, if that does not help, other weights" in half


def test_a_check_raises_only_for_broken_rows() -> None:
    def explain(rows: list[int]) -> FloatingPointError:
        return FloatingPointError(str(rows))

    FiniteCheck(torch.zeros(3, dtype=torch.bool), explain)()
    with pytest.raises(FloatingPointError, match=r"^\[1, 2\]$"):
        FiniteCheck(torch.tensor([False, True, True]), explain)()
    model = Two()
    with pytest.raises(
        FloatingPointError, match=r"in 1 of 2 examples \(first: number 0\) \(precision float32\): the in"
    ):
        check_finite("it is", torch.tensor([[NAN], [0.0]]), "float32", model, lambda: model(torch.full((1, 2), NAN)))
