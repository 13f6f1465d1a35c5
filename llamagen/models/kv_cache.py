"""Keys and values of the positions that a GPT has already seen."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llamagen.models.gpt_config import GPTConfig


class LayerCache(NamedTuple):
    """What one layer sees of a :class:`KVCache`.

    Attributes:
        keys: (B, G, P, E).
        values: (B, G, P, E).
        length: number of positions that are filled.
    """

    keys: Tensor
    values: Tensor
    length: int

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values behind the filled part.

        Args:
            keys: (B, G, T, E) of T new positions.
            values: (B, G, T, E).

        Returns:
            Views of the filled part, the new positions included: keys and values (B, G, length + T, E).

        Raises:
            ValueError: if the new positions do not fit.
        """
        end = self.length + keys.shape[2]
        if end > self.keys.shape[2]:
            raise ValueError(f"the cache holds {self.keys.shape[2]} positions and cannot take position {end}")
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        return self.keys[:, :, :end], self.values[:, :, :end]


@dataclass
class KVCache:
    """Preallocated keys and values, an argument of the model and never a part of it.

    B rows, N layers, G key-value heads, P positions, E width of a head.

    Attributes:
        keys: (N, B, G, P, E).
        values: (N, B, G, P, E).
        length: number of positions that are filled, the same for each row.
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
        """An empty cache that holds the condition and all codes but the last, which nothing attends to."""
        positions = config.condition_length + config.block_size - 1
        shape = (config.n_layer, batch_size, config.kv_heads, positions, config.head_dim)
        return cls(torch.empty(shape, device=device, dtype=dtype), torch.empty(shape, device=device, dtype=dtype))

    def layer(self, index: int) -> LayerCache:
        """The part of a layer, to be appended to; call :meth:`advance` after the last layer."""
        return LayerCache(self.keys[index], self.values[index], self.length)

    def advance(self, positions: int) -> None:
        """Count ``positions`` new positions as filled."""
        self.length += positions

    def first_rows(self, count: int) -> "KVCache":
        """A cache of the first ``count`` rows that shares memory with this one."""
        return KVCache(self.keys[:, :count], self.values[:, :count], self.length)
