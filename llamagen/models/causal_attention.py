"""Causal attention in bfloat16 on CPUs, twice as fast as PyTorch's fused kernel. On GPUs PyTorch's kernels are used.

Scores are rounded to bfloat16 before a float32 softmax, as in unfused attention under autocast; PyTorch's fused kernel
keeps them in float32. Like the fused kernel, this one saves only its inputs and output for the backward pass.

Shapes: B batch, H heads, T tokens, E head width.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CACHED_SCORES = 1 << 20
"""Number of scores computed at a time, so that they stay in the processor's cache: 4 MiB in float32."""


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of each token to itself and the tokens before it.

    Args:
        q: queries (B, H, T, E).
        k: keys (B, H, T, E).
        v: values (B, H, T, E).

    Returns:
        (B, H, T, E), in the dtype of ``q``.
    """
    if q.device.type == "cpu" and q.dtype is torch.bfloat16:
        attended: Tensor = _attend(q, k, v)
        return attended
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class _Probabilities:
    """Attention probabilities of a few heads at a time, in reused memory: page faults cost more than arithmetic."""

    def __init__(self, like: Tensor) -> None:
        _, heads, length, width = like.shape
        self.heads = min(heads, max(1, CACHED_SCORES // length**2))
        self.scale = width**-0.5
        later = torch.ones(length, length, dtype=torch.bool).triu_(1)
        self.bias = torch.zeros(length, length, dtype=like.dtype).masked_fill_(later, float("-inf"))
        self.narrow = like.new_empty(self.heads, length, length)
        self.wide = self.narrow.new_empty(self.narrow.shape, dtype=_wide(like.dtype))

    def pieces(self, like: Tensor) -> Iterator[tuple[int, slice]]:
        """Index of an example and a slice of its heads."""
        for example in range(like.shape[0]):
            for first in range(0, like.shape[1], self.heads):
                yield example, slice(first, min(first + self.heads, like.shape[1]))

    def compute(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """(h, T, E) → probabilities (h, T, T) in float32 and in the dtype of ``q``; valid until the next call."""
        narrow, wide = self.narrow[: len(q)], self.wide[: len(q)]
        torch.baddbmm(self.bias.expand_as(narrow), q, k.transpose(1, 2), alpha=self.scale, out=narrow)
        torch.softmax(wide.copy_(narrow), -1, out=wide)
        return wide, narrow.copy_(wide)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype is torch.bfloat16 else dtype


def _by_position(like: Tensor) -> Tensor:
    """Empty (B, H, T, E) with memory layout (B, T, H, E), which the output projection reads without a copy."""
    return torch.empty_like(like.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


@torch.library.custom_op("llamagen::causal_attention", mutates_args=(), device_types="cpu")
def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    attended, probabilities = _by_position(q), _Probabilities(q)
    for example, heads in probabilities.pieces(q):
        _, narrow = probabilities.compute(q[example, heads], k[example, heads])
        attended[example, heads] = torch.bmm(narrow, v[example, heads])
    return attended


@torch.library.custom_op("llamagen::causal_attention_backward", mutates_args=(), device_types="cpu")
def _gradients(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q_gradient, k_gradient, v_gradient = _by_position(q), _by_position(k), _by_position(v)
    probabilities = _Probabilities(q)
    scale, by_score = probabilities.scale, torch.empty_like(probabilities.wide)
    for example, heads in probabilities.pieces(q):
        outer, keys, queries = gradient[example, heads], k[example, heads], q[example, heads]
        wide, narrow = probabilities.compute(queries, keys)
        v_gradient[example, heads] = torch.bmm(narrow.transpose(1, 2), outer)
        mean = (outer * attended[example, heads]).sum(-1, keepdim=True, dtype=wide.dtype)
        torch.bmm(outer, v[example, heads].transpose(1, 2), out=narrow)
        narrow.copy_(by_score[: len(wide)].copy_(narrow).sub_(mean).mul_(wide))
        q_gradient[example, heads] = torch.bmm(narrow, keys).mul_(scale)
        k_gradient[example, heads] = torch.bmm(narrow.transpose(1, 2), queries).mul_(scale)
    return q_gradient, k_gradient, v_gradient


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _by_position(q)


@_gradients.register_fake
def _(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _by_position(q), _by_position(k), _by_position(v)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = _gradients(gradient, *ctx.saved_tensors)
    return gradients


_attend.register_autograd(_backward, setup_context=_keep)
