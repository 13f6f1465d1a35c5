"""A decode step of the GPT on a CUDA device in Triton kernels: one new token for each row, or a window of several.

There are five kernels per layer (one more with windows in float32, and one more with QK-norm), one before the first
layer and one after the last. All launches are the same in each step, so a step can be captured in a CUDA graph. Before
the capture, call it once with the same shapes: kernels are compiled at their first launch.

Shapes: R rows of the cache in a call, T new tokens of a row (the window), B = R · T, D model width, F feed-forward
width, H query heads, G key-value heads, E head width, N outputs and K inputs of a linear layer, P tokens of cache
capacity, V vocabulary size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llamagen.sampling.decode_weights import DecodeWeights, LayerWeights, Matrix
from llamagen.sampling.gpu.attention_launch import AttentionLaunch, power_of_two

MAX_TILE_ROWS = 128  # more rows take several tiles
MAX_EARLY_ROWS, MAX_EARLY_BYTES = 32, 1 << 25  # limits for early starts: rows, and weight bytes per layer
PREFETCHED_BYTES = 1 << 16  # of weights that a program prefetches before it waits


class Tile(NamedTuple):
    """Tile sizes of a linear layer.

    Attributes:
        rows: rows of the input of a program, a power of two, at least 16.
        outputs: outputs of a program (of each matrix, if gated), a power of two, at least 16.
        inputs: inputs of an iteration of its loop, a power of two.
        parts: number of separate sums over the inputs of an iteration, one for each warp; 1 means one sum.
        splits: number of programs that share the inputs. Only layers before a residual connection may have several.
        warps: number of warps of a program.
        stages: pipeline stages of the loop.
    """

    rows: int
    outputs: int
    inputs: int
    parts: int
    splits: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Product:
    """Shape of a linear layer.

    Attributes:
        outputs: N.
        inputs: K.
        matrices: number of weights that share the input: 2 if gated.
        may_split: whether several programs may share K.
    """

    outputs: int
    inputs: int
    matrices: int = 1
    may_split: bool = False


def choose_tile(product: Product, rows: int, dtype: torch.dtype, weight_bytes: int, processors: int) -> Tile:
    """Choose the tile for which the busiest multiprocessor loads the fewest bytes.

    A program loads its weights from memory, and the input of its rows from the cache, which is about twice as fast.

    Args:
        product: the layer.
        rows: B.
        dtype: dtype of the products. In float32 the tile does not depend on ``rows``, so neither does a row's result.
        weight_bytes: bytes of a weight entry.
        processors: number of multiprocessors of the device.
    """
    if dtype == torch.float32:
        return Tile(rows=16, outputs=32, inputs=32, parts=1, splits=1, warps=4, stages=4)
    height = min(max(16, power_of_two(rows)), MAX_TILE_ROWS)
    parts = 4 if height == 16 else 1
    if parts == 1:
        height = max(64, height)  # rows that a warp group multiplies at a time
    merge_cost = 1 << 16  # bytes that could be loaded while the programs of a tile add their partial sums
    best, lowest = None, float("inf")
    for outputs in (64, 32, 16):
        if parts == 1 and outputs == 16:
            continue
        for splits in (1, 2, 3, 4, 6, 8) if product.may_split else (1,):
            programs = -(-product.outputs // outputs) * splits  # for up to 128 rows
            split_inputs = -(-product.inputs // splits)
            loaded = split_inputs * (product.matrices * outputs * weight_bytes + height * dtype.itemsize / 2)
            cost = -(-programs // processors) * loaded
            if splits > 1:
                cost += merge_cost + 4 * splits * height * outputs
            if cost < lowest:
                best, lowest = (outputs, splits), cost
    assert best is not None
    outputs, splits = best
    inputs = 64 * parts if parts > 1 else 128

    def stage_bytes(inputs: int) -> int:
        return inputs * (height * dtype.itemsize + product.matrices * outputs * weight_bytes)

    while stage_bytes(inputs) > 1 << 15 and inputs > 64:
        inputs //= 2
    stages = max(2, min(5, (100 << 10) // stage_bytes(inputs)))
    return Tile(height, outputs, inputs, parts, splits, 8 if height == MAX_TILE_ROWS else 4, stages)


class GPUStep:
    """Computes the logits after new tokens of each row, and writes the tokens into the cache.

    The residual stream and all sums are float32. Operands of products, keys and values have the dtype of the weights.
    Results are deterministic. In float32 the result of a token does not depend on the other rows, on their number or on
    T. In other dtypes the tiles depend on B and the kernel of attention on T, so sums may be rounded differently.

    Args:
        weights: weights on a CUDA device.
        rows: largest B of a call; workspaces are allocated here, once.
        tiles: tiles that replace the chosen ones, by layer: ``"wqkv"``, ``"wo"``, ``"gate"``, ``"w2"`` or ``"head"``.
        early: let kernels prefetch their weights while the previous kernel still runs. The default is True for few rows
            of a small model on devices of compute capability 9.0 or higher; it slows down larger ones.

    Raises:
        ImportError: without Triton.
        ValueError: if ``rows`` is less than 1.
    """

    def __init__(
        self,
        weights: DecodeWeights,
        rows: int,
        *,
        tiles: Mapping[str, Tile] | None = None,
        early: bool | None = None,
    ) -> None:
        from llamagen.sampling.gpu import kernels  # needs Triton, which CPU builds of torch do not have

        if rows < 1:
            raise ValueError(f"rows is {rows}; it must be at least 1")
        self._kernels: Any = kernels
        self._weights, self._rows = weights, rows
        self._given = dict(tiles or {})
        config = weights.config
        device, dtype = weights.norm.device, weights.dtype
        self._processors, supports_early = 132, False
        if device.type == "cuda":
            self._processors = torch.cuda.get_device_properties(device).multi_processor_count
            supports_early = torch.cuda.get_device_capability(device) >= (9, 0)
        if early is None:
            early = supports_early and weights.nbytes <= config.n_layer * MAX_EARLY_BYTES
            self._early_rows = MAX_EARLY_ROWS if early else 0
        else:
            self._early_rows = rows if early else 0
        self._early = False
        self._attention = AttentionLaunch(config, dtype, self._processors, self._launch)
        dim, ffn = config.dim, config.ffn_dim
        self._qkv_width = (config.n_head + 2 * config.kv_heads) * config.head_dim
        self._products = {
            "wqkv": Product(self._qkv_width, dim),
            "wo": Product(dim, dim, may_split=True),
            "gate": Product(ffn, dim, matrices=2),
            "w2": Product(dim, ffn, may_split=True),
            "head": Product(config.vocab_size, dim),
        }
        self._chosen: dict[int, dict[str, Tile]] = {}
        self._tiles_padded = power_of_two(-(-dim // 16))
        self._x = torch.zeros(rows, dim, device=device, dtype=torch.float32)
        self._scaled = torch.zeros(rows, dim, device=device, dtype=dtype)
        self._squares = torch.zeros(rows, self._tiles_padded, device=device, dtype=torch.float32)
        self._qkv = torch.zeros(rows, self._qkv_width, device=device, dtype=torch.float32)
        self._attended = torch.zeros(rows, dim, device=device, dtype=dtype)
        self._hidden = torch.zeros(rows, ffn, device=device, dtype=dtype)
        sizes = [self._partial_sizes(name, count) for name in ("wo", "w2") for count in _row_counts(rows)]
        self._partial = torch.zeros(max(size for size, _ in sizes), device=device, dtype=torch.float32)
        self._arrived = torch.zeros(max(tiles for _, tiles in sizes), device=device, dtype=torch.int32)

    def __call__(self, x: Tensor, position: Tensor, first: Tensor | None, keys: Tensor, values: Tensor) -> Tensor:
        """Decode new tokens.

        Args:
            x: (B, D) float32, the embedded tokens, those of a row one after the other; not changed.
            position: integers on the device, number of cached tokens, which is the position of the first new one: a
                scalar for all rows, which then have one token each; or (R,).
            first: (R,) int32, index of the first token of each row that is not padding; None without padding. A new
                token always attends to itself.
            keys: (layers, at least R, G, P, E), contiguous, in the dtype of the weights. Entries before ``position``
                are read, those of the new tokens are written. Tokens beyond the capacity are not written, and their
                logits mean nothing.
            values: like ``keys``.

        Returns:
            (B, V) float32.

        Raises:
            ValueError: if there are no rows, more rows than workspaces, or shapes or dtypes do not fit.
        """
        self._check(x, position, first, keys, values)
        kernels, weights, config = self._kernels, self._weights, self._weights.config
        count, tiles = len(x), self.tiles(len(x))
        self._early = count <= self._early_rows
        self._launch(
            kernels.prepare, (count,), 4, 1, False,
            x.contiguous(), weights.layers[0].attention_norm, self._x, self._scaled, self._squares,
            D=config.dim, D_PADDED=power_of_two(config.dim), TILES_PADDED=self._tiles_padded,
        )  # fmt: skip
        after_wo, after_w2 = (-(-config.dim // tiles[name].outputs) for name in ("wo", "w2"))
        gains = [layer.attention_norm for layer in weights.layers[1:]] + [weights.norm]
        for layer, gain, layer_keys, layer_values in zip(weights.layers, gains, keys, values, strict=True):
            self._norm_linear(layer.wqkv, tiles["wqkv"], after_w2, self._qkv[:count])
            self._normalise_heads(layer, count)
            self._attention(self._qkv, weights.rope, self._attended, position, first, layer_keys, layer_values, count)
            self._linear_residual(self._attended, layer.wo, tiles["wo"], layer.ffn_norm, count)
            self._norm_gated(layer, tiles["gate"], after_wo, count)
            self._linear_residual(self._hidden, layer.w2, tiles["w2"], gain, count)
        logits = torch.empty(count, config.vocab_size, device=x.device, dtype=torch.float32)
        self._norm_linear(weights.head, tiles["head"], after_w2, logits)
        return logits

    def tiles(self, rows: int) -> dict[str, Tile]:
        """Tiles of a call with ``rows`` rows, by layer."""
        if rows not in self._chosen:
            item = self._weights.head.values.itemsize
            self._chosen[rows] = {
                name: self._given.get(name) or choose_tile(product, rows, self._weights.dtype, item, self._processors)
                for name, product in self._products.items()
            }
        return self._chosen[rows]

    def _partial_sizes(self, name: str, rows: int) -> tuple[int, int]:
        """Number of partial sums and number of tiles of a product."""
        tile = self.tiles(rows)[name]
        tiles = -(-self._products[name].outputs // tile.outputs) * -(-rows // tile.rows)
        return tiles * tile.splits * tile.rows * tile.outputs, tiles

    def _check(self, x: Tensor, position: Tensor, first: Tensor | None, keys: Tensor, values: Tensor) -> None:
        config, rows = self._weights.config, len(x)
        cache_rows = len(position) if position.dim() else rows
        if not 1 <= rows <= self._rows:
            raise ValueError(f"x has {rows} rows, but there are workspaces for 1 to {self._rows}")
        if x.shape != (rows, config.dim) or x.dtype != torch.float32:
            raise ValueError(f"x must be float32 of width {config.dim}, not {x.dtype} of shape {tuple(x.shape)}")
        if position.dtype not in (torch.int32, torch.int64) or position.device != x.device:
            raise ValueError("position must be int32 or int64 on the device of x")
        if position.dim() > 1 or not cache_rows or rows % cache_rows or not position.is_contiguous():
            raise ValueError(f"position must be a scalar or one for each row, not of shape {tuple(position.shape)}")
        if first is not None and (first.shape != (cache_rows,) or first.dtype != torch.int32):
            raise ValueError(f"first must be int32 of shape ({cache_rows},), not {first.dtype} of {tuple(first.shape)}")
        for name, cache in (("keys", keys), ("values", values)):
            fits = (
                cache.dim() == 5
                and cache.shape[0] == config.n_layer
                and cache.shape[1] >= cache_rows
                and (cache.shape[2], cache.shape[4]) == (config.kv_heads, config.head_dim)
                and cache.shape == keys.shape
            )
            if not fits or not cache.is_contiguous() or cache.dtype != self._weights.dtype:
                raise ValueError(
                    f"{name} must be contiguous {self._weights.dtype} ({config.n_layer}, at least {cache_rows}, "
                    f"{config.kv_heads}, P, {config.head_dim}), not {cache.dtype} of {tuple(cache.shape)}"
                )

    def _launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        warps: int,
        stages: int,
        dependent: bool,
        *arguments: Any,
        **options: Any,
    ) -> None:
        """Launch a kernel; ``dependent`` lets it start while the previous one still runs."""
        kernel[grid](
            *arguments, **options, EARLY=self._early,
            num_warps=warps, num_stages=stages, launch_pdl=self._early and dependent,
        )  # fmt: skip

    def _layout(self, matrix: Matrix, tile: Tile) -> dict[str, Any]:
        """Constants that all products need."""
        outputs, inputs = matrix.values.shape
        split_inputs = -(-inputs // (tile.inputs * tile.splits)) * tile.inputs
        item = matrix.values.itemsize
        return {
            "N": outputs,
            "K": inputs,
            "INT8": matrix.scale is not None,
            "ROWS": tile.rows,
            "OUTPUTS": tile.outputs,
            "INPUTS": tile.inputs,
            "PARTS": tile.parts,
            "SPAN": min(split_inputs, PREFETCHED_BYTES // (tile.outputs * item)),
            "LANES": 32 * tile.warps,
        }

    def _norm_linear(self, matrix: Matrix, tile: Tile, squares: int, out: Tensor) -> None:
        count, outputs = out.shape
        grid = (-(-outputs // tile.outputs), -(-count // tile.rows))
        self._launch(
            self._kernels.norm_linear, grid, tile.warps, tile.stages, True,
            self._scaled, self._squares, matrix.values, _factor(matrix), out, count, self._weights.config.norm_eps,
            TILES=squares, TILES_PADDED=self._tiles_padded, WIDTH=_width(squares, tile), **self._layout(matrix, tile),
        )  # fmt: skip

    def _normalise_heads(self, layer: LayerWeights, count: int) -> None:
        """QK-norm, by a kernel of its own: so kernels of attention with and without a window read the same bits."""
        if layer.q_norm is None:
            return
        config = self._weights.config
        self._launch(
            self._kernels.normalise_heads, (count, config.n_head + config.kv_heads), 1, 1, True,
            self._qkv, layer.q_norm, layer.k_norm, config.norm_eps,
            H=config.n_head, G=config.kv_heads, E=config.head_dim, E_PADDED=power_of_two(config.head_dim),
        )  # fmt: skip

    def _norm_gated(self, layer: LayerWeights, tile: Tile, squares: int, count: int) -> None:
        grid = (-(-len(layer.w1.values) // tile.outputs), -(-count // tile.rows))
        self._launch(
            self._kernels.norm_gated, grid, tile.warps, tile.stages, True,
            self._scaled, self._squares, layer.w1.values, layer.w3.values, _factor(layer.w1), _factor(layer.w3),
            self._hidden, count, self._weights.config.norm_eps,
            TILES=squares, TILES_PADDED=self._tiles_padded, WIDTH=_width(squares, tile), **self._layout(layer.w1, tile),
        )  # fmt: skip

    def _linear_residual(self, hidden: Tensor, matrix: Matrix, tile: Tile, gain: Tensor, count: int) -> None:
        grid = (-(-len(matrix.values) // tile.outputs), -(-count // tile.rows), tile.splits)
        self._launch(
            self._kernels.linear_residual, grid, tile.warps, tile.stages, True,
            hidden, matrix.values, _factor(matrix), gain, self._x, self._scaled, self._squares,
            self._partial, self._arrived, count,
            TILES_PADDED=self._tiles_padded, SPLITS=tile.splits, **self._layout(matrix, tile),
        )  # fmt: skip


def _factor(matrix: Matrix) -> Tensor:
    """Scales of the outputs. Without scales kernels need some tensor as the argument, which they do not read."""
    return matrix.values if matrix.scale is None else matrix.scale


def _width(squares: int, tile: Tile) -> int:
    """Number of sums of squares of a row that a program keeps in registers: 32 in each of 128 threads."""
    return min(power_of_two(squares), 4096 // tile.rows)


def _row_counts(rows: int) -> list[int]:
    """For each choice of tiles, the largest number of rows that uses it, up to and including ``rows``."""
    return [count for count in (16, 64, MAX_TILE_ROWS) if count < rows] + [rows]
