"""The parts of a transformer block: norms, attention with rotary positions, SwiGLU, stochastic depth.

Shapes: B batch, T tokens of this call, S tokens so far (including those of this call), D model width, H query heads,
G key-value heads, E head width.
"""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamagen.models.causal_attention import causal_attention
from llamagen.models.dropout import Dropout
from llamagen.models.gpt_config import GPTConfig
from llamagen.models.kv_cache import BLOCK_VECTORS, LayerCache
from llamagen.models.rope import rotate


class RMSNorm(nn.Module):
    """Root mean square normalisation over the last axis, computed in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) → (…, D)."""
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


class AdaptiveNorm(nn.Module):
    """Gains, shifts and gates as linear functions of the class embedding: adaLN-Zero.

    All start at zero, so at first a norm is not adapted, and a gated branch adds nothing.

    Args:
        dim: D.
        count: number of vectors of width D.
    """

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(dim, count * dim)

    def forward(self, condition: Tensor) -> Tensor:
        """Class embeddings (B, D) → (count, B, D)."""
        vectors = cast(Tensor, self.linear(F.silu(condition)))
        return vectors.view(len(vectors), self.count, -1).transpose(0, 1)


def modulate(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """Adapt a normalised input (B, T, D) by gain and shift, (B, D): ``x * (1 + gain) + shift``."""
    return x * (1.0 + gain[:, None]) + shift[:, None]


class DropPath(nn.Module):
    """Stochastic depth: in training, skip a residual branch for random examples and rescale the others."""

    probability: Tensor

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.active = probability > 0.0
        # footgun: as a Python float, each block's own probability would trigger a recompilation of the block. As a
        # buffer it is an input of the graph. Like the rotary table it is recomputed after every move, never rounded.
        self._make_probability = partial(torch.full, (), probability)
        self.register_buffer("probability", self._make_probability(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DropPath":
        super()._apply(fn, recurse)
        self.probability = self._make_probability(device=self.probability.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        if not self.training or not self.active:
            return x
        kept = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.probability
        return x * kept / (1.0 - self.probability)


class Attention(nn.Module):
    """Causal self-attention with fused projections, rotary positions and grouped key-value heads."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head, self.kv_heads, self.head_dim = config.n_head, config.kv_heads, config.head_dim
        self.attn_dropout = config.attn_dropout
        self.wqkv = nn.Linear(config.dim, (config.n_head + 2 * config.kv_heads) * config.head_dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.resid_dropout = Dropout(config.resid_dropout)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor | None, cache: LayerCache | None) -> Tensor:
        """Attend.

        Args:
            x: (B, T, D).
            rope: (T, E / 2, 2) or (B, T, E / 2, 2), cosine and sine of each token's position.
            mask: bool, broadcastable to (B, 1, T, S), True where a query may attend; None for a causal mask.
            cache: keys and values of this layer; the new ones are appended.

        Returns:
            (B, T, D).
        """
        widths = [self.n_head * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.wqkv(x).split(widths, dim=-1))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).type_as(v), self.k_norm(k).type_as(v)
        q, k, v = rotate(q, rope).transpose(1, 2), rotate(k, rope).transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k.to(cache.keys.dtype), v.to(cache.values.dtype))
            k, v = k.to(q.dtype), v.to(q.dtype)
        causal, dropout = mask is None and q.shape[2] > 1, self.attn_dropout if self.training else 0.0
        if causal and not dropout and self.kv_heads == self.n_head and cache is None:
            attended = causal_attention(q, k, v)
        else:
            grouped = self.kv_heads != self.n_head
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=grouped)
        return cast(Tensor, self.resid_dropout(self.wo(attended.transpose(1, 2).flatten(2))))


class FeedForward(nn.Module):
    """SwiGLU: ``w2(silu(w1 x) * w3 x)``."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.ffn_dropout = Dropout(config.ffn_dropout, place=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        return cast(Tensor, self.ffn_dropout(self.w2(F.silu(self.w1(x)) * self.w3(x))))


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual connection."""

    def __init__(self, config: GPTConfig, drop_path: float) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.drop_path = DropPath(drop_path)
        self.adaptive_norm = AdaptiveNorm(config.dim, BLOCK_VECTORS) if config.adaptive_norm else None

    def forward(
        self, x: Tensor, rope: Tensor, mask: Tensor | None, cache: LayerCache | None, condition: Tensor | None = None
    ) -> Tensor:
        """(B, T, D) → (B, T, D).

        Args:
            x: see :meth:`Attention.forward`, as are ``rope``, ``mask`` and ``cache``.
            rope: see above.
            mask: see above.
            cache: see above. It also keeps what the adaptive norms computed from the condition.
            condition: (B, D), the class embedding, for adaptive norms; None reads the cache.
        """
        if self.adaptive_norm is None:
            x = x + self.drop_path(self.attention(self.attention_norm(x), rope, mask, cache))
            return x + cast(Tensor, self.drop_path(self.feed_forward(self.ffn_norm(x))))
        vectors = adaptive_vectors(self.adaptive_norm, condition, None if cache is None else cache.adaptive).type_as(x)
        gain, shift, gate, ffn_gain, ffn_shift, ffn_gate = vectors
        attended = self.attention(modulate(self.attention_norm(x), gain, shift), rope, mask, cache)
        x = x + self.drop_path(gate[:, None] * attended)
        forwarded = self.feed_forward(modulate(self.ffn_norm(x), ffn_gain, ffn_shift))
        return x + cast(Tensor, self.drop_path(ffn_gate[:, None] * forwarded))


def adaptive_vectors(norm: AdaptiveNorm, condition: Tensor | None, cached: Tensor | None) -> Tensor:
    """Vectors of an adaptive norm, computed from the condition and kept in the cache, or read from it.

    Args:
        norm: the adaptive norm.
        condition: (B, D), or None in a later call for the same sequences.
        cached: (count, B, D), memory of the cache, if there is one.

    Returns:
        (count, B, D).

    Raises:
        ValueError: if there is neither a condition nor a cache.
    """
    if condition is None:
        if cached is None:
            raise ValueError("adaptive norms need the condition; pass it, or the cache of the call that had it")
        return cached
    vectors = cast(Tensor, norm(condition))
    if cached is not None:
        cached.copy_(vectors)
    return vectors
