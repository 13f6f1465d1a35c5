"""Choice and launch of the attention kernels of a pass.

Shapes: R rows of the cache, T new tokens of a row (the window), M = R · T new tokens, H query heads, G key-value heads,
E head width, P tokens of cache capacity.
"""

from collections.abc import Callable
from math import e as euler
from math import log2
from typing import Any

import torch
from torch import Tensor

from llamagen.models.gpt import GPTConfig

MAX_QUERIES = 64  # of a program that multiplies matrices
WINDOW_BLOCK = 64  # keys that it reads at a time


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << (number - 1).bit_length()


def choose_attention_block(programs: int, dtype: torch.dtype, processors: int) -> tuple[int, int]:
    """Choose the warps of an attention program and the tokens that it reads at a time.

    A program mostly waits for memory. With more programs smaller ones are better, because more of them run at once.

    Args:
        programs: number of programs.
        dtype: dtype of the cache. In float32 the choice is fixed, so that a row's result does not depend on the batch.
        processors: number of multiprocessors of the device.
    """
    if dtype == torch.float32:
        return 4, 32
    for programs_each, block in ((2, (4, 64)), (4, (4, 32)), (8, (2, 32))):
        if programs <= programs_each * processors:
            return block
    return 1, 8


class AttentionLaunch:
    """Launches the kernels of attention.

    A pass over one token of each row takes one program for each row and heads. In float32, passes over several tokens
    do the same after a kernel that writes their keys and values: so the result of a token is the same for every T. In
    other dtypes, where results depend on the size of a pass anyway, several tokens share matrix products, and the cache
    is read once for all of them.

    Args:
        config: shape of the model.
        dtype: dtype of the cache.
        processors: number of multiprocessors of the device.
        launch: launches a kernel, given kernel, grid, warps, stages, whether it may start early, and its arguments.

    Raises:
        ImportError: without Triton.
    """

    def __init__(self, config: GPTConfig, dtype: torch.dtype, processors: int, launch: Callable[..., None]) -> None:
        from llamagen.sampling.gpu import attention, window_attention

        self._append: Any = attention.append
        self._attend: Any = attention.attend
        self._attend_window: Any = window_attention.attend_window
        self._dtype, self._processors, self._launch = dtype, processors, launch
        self._shared = config.n_head // config.kv_heads
        self._groups, self._width = config.kv_heads, power_of_two(config.head_dim)
        self._shape = {"H": config.n_head, "G": config.kv_heads, "E": config.head_dim}
        self._scale = config.head_dim**-0.5 * log2(euler)

    def __call__(
        self,
        qkv: Tensor,
        rope: Tensor,
        out: Tensor,
        position: Tensor,
        first: Tensor | None,
        keys: Tensor,
        values: Tensor,
        count: int,
    ) -> None:
        """Write the new tokens into the cache of a layer, and compute their attention.

        Args:
            qkv: (at least M, (H + 2 G) E) float32, before rotation.
            rope: (positions, E / 2, 2) float32.
            out: (at least M, H E), written to.
            position: number of cached tokens: a scalar for all rows, which then have one token each, or (R,).
            first: (R,) int32, index of the first token of each row that is not padding; None without padding.
            keys: (at least R, G, P, E).
            values: like ``keys``.
            count: M.
        """
        window = count // len(position) if position.dim() else 0
        capacity = keys.shape[2]
        if window > 1 and self._dtype != torch.float32:
            queries = min(MAX_QUERIES, max(16, power_of_two(self._shared * window)))
            grid = (len(position), self._groups, -(-self._shared * window // queries))
            self._launch(
                self._attend_window, grid, 4, 2, True,
                qkv, rope, keys, values, out, position, position if first is None else first, capacity, self._scale,
                **self._shape, E_PADDED=max(16, self._width), WINDOW=window, QUERIES=queries, BLOCK=WINDOW_BLOCK,
                PADDED=first is not None,
            )  # fmt: skip
            return
        if window > 1:
            self._launch(
                self._append, (count, self._groups), 1, 1, True,
                qkv, rope, keys, values, position, capacity,
                **self._shape, E_PADDED=self._width, WINDOW=window,
            )  # fmt: skip
        heads = min(4, power_of_two(self._shared))
        tiles = self._groups * -(-self._shared // heads)
        warps, block = choose_attention_block(count * tiles, self._dtype, self._processors)
        block = min(block, warps * 1024 // (heads * self._width))  # so that the sums fit into registers
        self._launch(
            self._attend, (count, tiles), warps, 1, True,
            qkv, rope, keys, values, out, position, position if first is None else first, capacity, self._scale,
            **self._shape, E_PADDED=self._width, HEADS=heads, BLOCK=max(2, block), PADDED=first is not None,
            WINDOW=window,
        )  # fmt: skip
