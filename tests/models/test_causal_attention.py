"""Attention in bfloat16 on CPUs and its gradient are as accurate as bfloat16 allows, eager and compiled."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llamagen.models import causal_attention as module
from llamagen.models.causal_attention import _attend, causal_attention


def inputs(dtype: torch.dtype, batch: int = 2, heads: int = 3, length: int = 33, width: int = 16) -> list[Tensor]:
    """Queries, keys and values in the memory layout of the projections."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, batch, length, heads, width, generator=generator, dtype=torch.float64)
    return [each.to(dtype).transpose(1, 2).requires_grad_() for each in values]


def results(attend: object, dtype: torch.dtype) -> list[Tensor]:
    """Result and gradients, in float64."""
    leaves = inputs(dtype)
    attended = attend(*leaves)  # type: ignore[operator]
    gradient = torch.randn(attended.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    attended.backward(gradient.to(dtype))
    grads = [leaf.grad for leaf in leaves]
    assert all(grad is not None for grad in grads)
    return [attended.detach().double(), *(grad.double() for grad in grads if grad is not None)]


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("scores", [1 << 20, 2 * 33 * 33, 1])
def test_equals_the_definition_in_float64(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CACHED_SCORES", scores)
    for found, expected in zip(results(_attend, torch.float64), results(fused, torch.float64), strict=True):
        torch.testing.assert_close(found, expected)


def test_is_about_as_accurate_as_the_fused_kernel_in_bfloat16() -> None:
    exact = results(fused, torch.float64)
    narrow = [each.bfloat16().double() for each in inputs(torch.float64)]
    assert len(narrow) == 3
    errors = [
        [
            float((found - expected).norm() / expected.norm())
            for found, expected in zip(results(f, torch.bfloat16), exact, strict=True)
        ]
        for f in (causal_attention, fused)
    ]
    for ours, theirs in zip(*errors, strict=True):
        assert ours < max(2.0 * theirs, 0.005)


def test_the_custom_kernel_is_used_for_bfloat16_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []
    monkeypatch.setattr(module, "_attend", lambda q, k, v: calls.append(q.dtype) or q)
    for dtype in (torch.bfloat16, torch.float32):
        causal_attention(*inputs(dtype))
    assert calls == [torch.bfloat16]


def test_is_one_operator_of_a_compiled_graph() -> None:
    compiled = torch.compile(causal_attention, backend="aot_eager_decomp_partition", fullgraph=True)
    for found, expected in zip(
        results(compiled, torch.bfloat16), results(causal_attention, torch.bfloat16), strict=True
    ):
        assert torch.equal(found, expected)


def test_the_operators_pass_pytorchs_checks() -> None:
    results = torch.library.opcheck(_attend, tuple(inputs(torch.bfloat16)))
    assert set(results.values()) == {"SUCCESS"}


def test_the_result_has_the_memory_layout_of_the_projections() -> None:
    assert causal_attention(*inputs(torch.bfloat16)).transpose(1, 2).is_contiguous()
