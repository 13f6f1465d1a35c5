"""Dropout drops entries at random and at the given rate, and none in evaluation."""

import pytest
import torch

from llamagen.models.dropout import Dropout, _kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_entries_are_dropped_at_the_given_rate_and_the_mean_is_kept(probability: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(301, 1001, dtype=dtype, requires_grad=True)
    y = Dropout(probability).train()(x)
    assert y.dtype == dtype
    share = float((y == 0).float().mean())
    assert share == pytest.approx(probability, abs=4 * (probability * (1 - probability) / y.numel()) ** 0.5 + 1e-5)
    assert y[y != 0].float().unique().tolist() == pytest.approx([1 / (1 - probability)], rel=5e-3)
    y.backward(torch.full_like(y, 2.0))
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * y.detach())


def test_entries_are_dropped_independently() -> None:
    torch.manual_seed(1)
    kept = _kept(torch.empty(4096, 64), 1 << 15, 0).float() - 0.5
    correlation = (kept.T @ kept) / (0.25 * len(kept))  # of columns; four of them share a random word
    off = correlation - torch.eye(64)
    assert float(off.abs().max()) < 5 / 4096**0.5
    assert float(kept.mean().abs()) < 0.005


def test_nothing_is_dropped_in_evaluation_or_at_probability_zero() -> None:
    x = torch.randn(5, 7)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0).train()(x) is x


def test_masks_depend_on_the_seed_and_differ_between_calls() -> None:
    drop, x = Dropout(0.3).train(), torch.ones(1000)
    torch.manual_seed(2)
    first, second = drop(x), drop(x)
    torch.manual_seed(2)
    assert torch.equal(drop(x), first)
    assert torch.equal(drop(x), second)
    assert not torch.equal(first, second)


def test_accepts_any_number_of_entries() -> None:
    for shape in ((), (0,), (1,), (3,), (2, 5)):
        assert _kept(torch.empty(shape), 100, 0).shape == shape


def test_in_a_compiled_graph_each_dropout_has_its_own_mask() -> None:
    one, other = Dropout(0.5).train(), Dropout(0.5, place=1).train()
    compiled = torch.compile(lambda x: (one(x), other(x)), backend="aot_eager_decomp_partition", fullgraph=True)
    x = torch.ones(1000, requires_grad=True)
    first, second = compiled(x)
    assert not torch.equal(first, second)
    (first.sum() + 3 * second.sum()).backward()
    assert x.grad is not None
    assert torch.equal(x.grad, (first + 3 * second).detach())
