"""Key-value cache of a GPT."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llamagen.models.gpt_config import GPTConfig

BLOCK_VECTORS, LAST_VECTORS = 6, 2
"""Vectors that adaptive norms compute for a block (gain, shift and gate of two branches) and for the last norm."""


class LayerCache(NamedTuple):
    """One layer of a :class:`KVCache`.

    Attributes:
        keys: (B, G, P, E).
        values: (B, G, P, E).
        length: number of tokens in the cache; if rows differ, in the fullest row.
        row_lengths: (B,) int64, number of tokens in each row; None if all rows have ``length``.
        adaptive: (6, B, D), vectors of the block's adaptive norms; None without them.
    """

    keys: Tensor
    values: Tensor
    length: int
    row_lengths: Tensor | None = None
    adaptive: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the keys and values of T new tokens after the cached ones of each row.

        Args:
            keys: (B, G, T, E).
            values: (B, G, T, E).

        Returns:
            Views of the keys and values of all tokens so far, each (B, G, length + T, E).

        Raises:
            ValueError: if the new tokens exceed the capacity.
        """
        new = keys.shape[2]
        end = self.length + new
        if end > self.keys.shape[2]:
            raise ValueError(f"the cache holds {self.keys.shape[2]} tokens and has no room for token {end}")
        if self.row_lengths is None:
            self.keys[:, :, self.length : end] = keys
            self.values[:, :, self.length : end] = values
        else:
            rows = torch.arange(len(keys), device=keys.device)[:, None]
            places = self.row_lengths[:, None] + torch.arange(new, device=keys.device)
            self.keys[rows, :, places] = keys.transpose(1, 2)
            self.values[rows, :, places] = values.transpose(1, 2)
        return self.keys[:, :, :end], self.values[:, :, :end]


@dataclass
class KVCache:
    """Preallocated keys and values. An argument of the model, never a part of it.

    Tokens are cached in the order in which they were passed, regardless of their positions on the grid.

    N layers, B rows, G key-value heads, P tokens of capacity, E head width, D model width.

    Attributes:
        keys: (N, B, G, P, E).
        values: (N, B, G, P, E).
        length: number of cached tokens; if rows differ, of the fullest row. Lower it to discard the last ones, such as
            wrong guesses: later calls overwrite them.
        row_lengths: (B,) int64, number of cached tokens of each row; None if all rows have ``length``.
        adaptive: (6 N + 2, B, D), vectors of the adaptive norms of each block and of the last norm, which depend on the
            condition only; None for models without adaptive norms.
    """

    keys: Tensor
    values: Tensor
    length: int = 0
    row_lengths: Tensor | None = None
    adaptive: Tensor | None = None

    @classmethod
    def allocate(
        cls,
        config: GPTConfig,
        batch_size: int,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "KVCache":
        """Allocate an empty cache for the condition and all codes but the last, to which nothing attends."""
        positions = config.condition_length + config.block_size - 1
        shape = (config.n_layer, batch_size, config.kv_heads, positions, config.head_dim)
        keys, values = (torch.empty(shape, device=device, dtype=dtype) for _ in range(2))
        adaptive = None
        if config.adaptive_norm:
            count = BLOCK_VECTORS * config.n_layer + LAST_VECTORS
            adaptive = torch.empty(count, batch_size, config.dim, device=device)
        return cls(keys, values, adaptive=adaptive)

    def layer(self, index: int) -> LayerCache:
        """Cache of one layer. Call :meth:`advance` after the last layer has appended to its own."""
        adaptive = None
        if self.adaptive is not None:
            adaptive = self.adaptive[BLOCK_VECTORS * index : BLOCK_VECTORS * (index + 1)]
        return LayerCache(self.keys[index], self.values[index], self.length, self.row_lengths, adaptive)

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` new tokens as cached."""
        self.length += tokens
        if self.row_lengths is not None:
            self.row_lengths = self.row_lengths + tokens

    def first_rows(self, count: int) -> "KVCache":
        """Cache of the first ``count`` rows, which shares memory with this one but counts its own length."""
        lengths = None if self.row_lengths is None else self.row_lengths[:count]
        adaptive = None if self.adaptive is None else self.adaptive[:, :count]
        return KVCache(self.keys[:, :count], self.values[:, :count], self.length, lengths, adaptive)

    def set_row_lengths(self, lengths: Tensor, longest: int) -> None:
        """Set the number of cached tokens of each row, (B,) int64, of which ``longest`` is the largest."""
        self.row_lengths, self.length = lengths, longest
