"""Key-value cache of a GPT."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llamagen.models.gpt_config import GPTConfig


class LayerCache(NamedTuple):
    """One layer of a :class:`KVCache`.

    Attributes:
        keys: (B, G, P, E).
        values: (B, G, P, E).
        length: number of tokens in the cache.
    """

    keys: Tensor
    values: Tensor
    length: int

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the keys and values of T new tokens after the cached ones.

        Args:
            keys: (B, G, T, E).
            values: (B, G, T, E).

        Returns:
            Views of the keys and values of all tokens so far, each (B, G, length + T, E).

        Raises:
            ValueError: if the new tokens exceed the capacity.
        """
        end = self.length + keys.shape[2]
        if end > self.keys.shape[2]:
            raise ValueError(f"the cache holds {self.keys.shape[2]} tokens and has no room for token {end}")
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        return self.keys[:, :, :end], self.values[:, :, :end]


@dataclass
class KVCache:
    """Preallocated keys and values. An argument of the model, never a part of it.

    Tokens are cached in the order in which they were passed, regardless of their positions on the grid.

    N layers, B rows, G key-value heads, P tokens of capacity, E head width.

    Attributes:
        keys: (N, B, G, P, E).
        values: (N, B, G, P, E).
        length: number of cached tokens, the same for all rows. Lower it to discard the last ones, such as rejected
            drafts: later calls overwrite them.
    """

    keys: Tensor
    values: Tensor
    length: int = 0

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
        return cls(torch.empty(shape, device=device, dtype=dtype), torch.empty(shape, device=device, dtype=dtype))

    def layer(self, index: int) -> LayerCache:
        """Cache of one layer. Call :meth:`advance` after the last layer has appended to its own."""
        return LayerCache(self.keys[index], self.values[index], self.length)

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` new tokens as cached."""
        self.length += tokens

    def first_rows(self, count: int) -> "KVCache":
        """Cache of the first ``count`` rows, which shares memory with this one but counts its own length."""
        return KVCache(self.keys[:, :count], self.values[:, :count], self.length)
