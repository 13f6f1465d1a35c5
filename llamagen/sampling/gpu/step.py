"""A decode step of the GPT on a CUDA device, in kernels of its own: one new position for each row.

Five kernels a layer, one in front and one behind. All launches are the same in each step, so a step can be captured in
a CUDA graph; call it once before for each number of rows, since kernels are compiled when they are first met.

Legend: B rows of a call, D width, F width of the feed-forward layer, H heads, G key-value heads, E width of a head,
N outputs and K inputs of a linear layer, P positions of the cache, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import e as euler
from math import log2
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llamagen.sampling.decode_weights import DecodeWeights, LayerWeights, Matrix

WIDEST = 128  # rows of a tile; more rows take more tiles
EARLY_ROWS, EARLY_BYTES = 32, 1 << 25  # most rows, and bytes of weights of a layer, with which kernels start early
ASKED_BYTES = 1 << 16  # of weights that a program asks for before it waits


class Tile(NamedTuple):
    """What one program of a linear layer computes.

    Attributes:
        rows: rows of the input, a power of two from 16 on.
        outputs: outputs, likewise. Of both matrices, if gated.
        inputs: inputs in a step of its loop, a power of two.
        parts: into how many sums the inputs of a step go, one for each warp; 1 sums them up together.
        splits: over how many programs the inputs are spread. More than 1 only in front of a residual connection.
        warps: of a program.
        stages: steps of the loop that are loaded or computed at a time.
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
    """A linear layer, as far as the choice of its tile goes.

    Attributes:
        outputs: N.
        inputs: K.
        matrices: weights that share the input: 2 if gated.
        may_split: whether K can be spread over programs.
    """

    outputs: int
    inputs: int
    matrices: int = 1
    may_split: bool = False


def choose_tile(product: Product, rows: int, dtype: torch.dtype, weight_bytes: int, processors: int) -> Tile:
    """The tile that takes a processor the shortest, by the bytes it has to load.

    A program loads its weights from the memory and the input of its rows from the cache, which is about twice as fast.
    Programs are spread evenly over the processors, so the busiest decides.

    Args:
        product: the layer.
        rows: B.
        dtype: of the products. In float32 the tile does not depend on ``rows``, so neither does a row's result.
        weight_bytes: bytes of a weight.
        processors: number of multiprocessors of the device.
    """
    if dtype == torch.float32:
        return Tile(rows=16, outputs=32, inputs=32, parts=1, splits=1, warps=4, stages=4)
    height = min(max(16, _power_of_two(rows)), WIDEST)
    parts = 4 if height == 16 else 1
    if parts == 1:
        height = max(64, height)  # the rows that a warp group multiplies at a time
    fixed = 1 << 16  # bytes that could be loaded while the programs of a tile meet to add their sums
    best, least = None, float("inf")
    for outputs in (64, 32, 16):
        if parts == 1 and outputs == 16:
            continue
        for splits in (1, 2, 3, 4, 6, 8) if product.may_split else (1,):
            programs = -(-product.outputs // outputs) * splits  # for up to 128 rows
            share = -(-product.inputs // splits)
            loaded = share * (product.matrices * outputs * weight_bytes + height * dtype.itemsize / 2)
            cost = -(-programs // processors) * loaded
            if splits > 1:
                cost += fixed + 4 * splits * height * outputs
            if cost < least:
                best, least = (outputs, splits), cost
    assert best is not None
    outputs, splits = best
    inputs = 64 * parts if parts > 1 else 128

    def stage(inputs: int) -> int:
        return inputs * (height * dtype.itemsize + product.matrices * outputs * weight_bytes)

    while stage(inputs) > 1 << 15 and inputs > 64:
        inputs //= 2
    stages = max(2, min(5, (100 << 10) // stage(inputs)))
    return Tile(height, outputs, inputs, parts, splits, 8 if height == WIDEST else 4, stages)


def choose_places(programs: int, dtype: torch.dtype, processors: int) -> tuple[int, int]:
    """Warps of a program of the attention, and positions that it reads at a time.

    A program mostly waits, so the more there are, the smaller they should be, for more of them to run at a time.

    Args:
        programs: their number.
        dtype: of the cache. In float32 a row's result must not depend on the number of rows, and so on ``programs``.
        processors: number of multiprocessors of the device.
    """
    if dtype == torch.float32:
        return 4, 32
    for most, places in ((2, (4, 64)), (4, (4, 32)), (8, (2, 32))):
        if programs <= most * processors:
            return places
    return 1, 8


class GPUStep:
    """Computes the logits behind one new position of each row, and extends the cache by it.

    The residual stream and all sums are float32; operands of products, keys and values have the dtype of the weights.
    Results are the same from run to run. In float32 a row's result depends neither on the other rows nor on their
    number; in other dtypes tiles are chosen by the number of rows, so sums may be rounded differently.

    Args:
        weights: on a CUDA device.
        rows: most rows of a call; workspaces for them are allocated here, once.
        tiles: tiles to use instead of the chosen ones, by the name of the layer: ``"wqkv"``, ``"wo"``, ``"gate"``,
            ``"w2"`` or ``"head"``.
        early: let kernels ask for their weights while the one in front still runs. By default for few rows of a small
            model, where the device can (compute capability 9.0); others are slowed down by it.

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
        from llamagen.sampling.gpu import attention, kernels  # Triton is not everywhere

        if rows < 1:
            raise ValueError(f"rows is {rows}; it must be at least 1")
        self._kernels: Any = kernels
        self._attention: Any = attention.attend
        self._weights, self._rows = weights, rows
        self._given = dict(tiles or {})
        config = weights.config
        device, dtype = weights.norm.device, weights.dtype
        self._processors, able = 132, False
        if device.type == "cuda":
            self._processors = torch.cuda.get_device_properties(device).multi_processor_count
            able = torch.cuda.get_device_capability(device) >= (9, 0)
        if early is None:
            able = able and weights.nbytes <= config.n_layer * EARLY_BYTES
            self._early_rows = EARLY_ROWS if able else 0
        else:
            self._early_rows = rows if early else 0
        self._early = False
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
        self._tiles_padded = _power_of_two(-(-dim // 16))
        self._x = torch.zeros(rows, dim, device=device, dtype=torch.float32)
        self._scaled = torch.zeros(rows, dim, device=device, dtype=dtype)
        self._squares = torch.zeros(rows, self._tiles_padded, device=device, dtype=torch.float32)
        self._qkv = torch.zeros(rows, self._qkv_width, device=device, dtype=torch.float32)
        self._attended = torch.zeros(rows, dim, device=device, dtype=dtype)
        self._hidden = torch.zeros(rows, ffn, device=device, dtype=dtype)
        sizes = [self._meeting(name, count) for name in ("wo", "w2") for count in _row_counts(rows)]
        self._partial = torch.zeros(max(size for size, _ in sizes), device=device, dtype=torch.float32)
        self._arrived = torch.zeros(max(tiles for _, tiles in sizes), device=device, dtype=torch.int32)

    def __call__(self, x: Tensor, position: Tensor, first: Tensor | None, keys: Tensor, values: Tensor) -> Tensor:
        """Decode one position.

        Args:
            x: (B, D) float32, embedded input; not changed.
            position: integer scalar on the device: index of the new position, which is the number of filled ones.
            first: (B,) int32, first position that each row attends to, if that is not 0. The new position attends to
                itself in any case.
            keys: (layers, at least B, G, P, E), contiguous, in the dtype of the weights; read before ``position``,
                written there.
            values: likewise.

        Returns:
            (B, V) float32.

        Raises:
            ValueError: if there are no rows or more than workspaces, or shapes or dtypes do not fit.
        """
        self._check(x, position, first, keys, values)
        kernels, weights, config = self._kernels, self._weights, self._weights.config
        count, tiles = len(x), self.tiles(len(x))
        self._early = count <= self._early_rows
        self._launch(
            kernels.prepare, (count,), 4, 1, False,
            x.contiguous(), weights.layers[0].attention_norm, self._x, self._scaled, self._squares,
            D=config.dim, D_PADDED=_power_of_two(config.dim), TILES_PADDED=self._tiles_padded,
        )  # fmt: skip
        after_wo, after_w2 = (-(-config.dim // tiles[name].outputs) for name in ("wo", "w2"))
        gains = [layer.attention_norm for layer in weights.layers[1:]] + [weights.norm]
        for layer, gain, layer_keys, layer_values in zip(weights.layers, gains, keys, values, strict=True):
            self._norm_linear(layer.wqkv, tiles["wqkv"], after_w2, self._qkv[:count])
            self._attend(count, position, first, layer_keys, layer_values)
            self._linear_residual(self._attended, layer.wo, tiles["wo"], layer.ffn_norm, count)
            self._norm_gated(layer, tiles["gate"], after_wo, count)
            self._linear_residual(self._hidden, layer.w2, tiles["w2"], gain, count)
        logits = torch.empty(count, config.vocab_size, device=x.device, dtype=torch.float32)
        self._norm_linear(weights.head, tiles["head"], after_w2, logits)
        return logits

    def tiles(self, rows: int) -> dict[str, Tile]:
        """The tiles that a call with ``rows`` rows uses, by the name of the layer."""
        if rows not in self._chosen:
            item = self._weights.head.values.itemsize
            self._chosen[rows] = {
                name: self._given.get(name) or choose_tile(product, rows, self._weights.dtype, item, self._processors)
                for name, product in self._products.items()
            }
        return self._chosen[rows]

    def _meeting(self, name: str, rows: int) -> tuple[int, int]:
        """Numbers of a product's partial sums and of its tiles."""
        tile = self.tiles(rows)[name]
        tiles = -(-self._products[name].outputs // tile.outputs) * -(-rows // tile.rows)
        return tiles * tile.splits * tile.rows * tile.outputs, tiles

    def _check(self, x: Tensor, position: Tensor, first: Tensor | None, keys: Tensor, values: Tensor) -> None:
        config, rows = self._weights.config, len(x)
        if not 1 <= rows <= self._rows:
            raise ValueError(f"{rows} rows were given, but there are workspaces for 1 to {self._rows}")
        if x.shape != (rows, config.dim) or x.dtype != torch.float32:
            raise ValueError(f"x must be float32 of width {config.dim}, not {x.dtype} of shape {tuple(x.shape)}")
        if position.dim() or position.dtype not in (torch.int32, torch.int64) or position.device != x.device:
            raise ValueError("position must be an int32 or int64 scalar on the device of x")
        if first is not None and (first.shape != (rows,) or first.dtype != torch.int32):
            raise ValueError(f"first must be int32 of shape ({rows},), not {first.dtype} of {tuple(first.shape)}")
        for name, cache in (("keys", keys), ("values", values)):
            fits = (
                cache.dim() == 5
                and cache.shape[0] == config.n_layer
                and cache.shape[1] >= rows
                and (cache.shape[2], cache.shape[4]) == (config.kv_heads, config.head_dim)
                and cache.shape == keys.shape
            )
            if not fits or not cache.is_contiguous() or cache.dtype != self._weights.dtype:
                raise ValueError(
                    f"{name} must be contiguous {self._weights.dtype} ({config.n_layer}, at least {rows}, "
                    f"{config.kv_heads}, P, {config.head_dim}), not {cache.dtype} of {tuple(cache.shape)}"
                )

    def _launch(
        self, kernel: Any, grid: tuple[int, ...], warps: int, stages: int, behind: bool, *arguments: Any, **options: Any
    ) -> None:
        """Launch a kernel; ``behind`` lets it start while the one in front still runs."""
        kernel[grid](
            *arguments, **options, EARLY=self._early,
            num_warps=warps, num_stages=stages, launch_pdl=self._early and behind,
        )  # fmt: skip

    def _layout(self, matrix: Matrix, tile: Tile) -> dict[str, Any]:
        """The constants that all products have."""
        outputs, inputs = matrix.values.shape
        share = -(-inputs // (tile.inputs * tile.splits)) * tile.inputs
        item = matrix.values.itemsize
        return {
            "N": outputs,
            "K": inputs,
            "INT8": matrix.scale is not None,
            "ROWS": tile.rows,
            "OUTPUTS": tile.outputs,
            "INPUTS": tile.inputs,
            "PARTS": tile.parts,
            "SPAN": min(share, ASKED_BYTES // (tile.outputs * item)),
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

    def _attend(self, count: int, position: Tensor, first: Tensor | None, keys: Tensor, values: Tensor) -> None:
        config = self._weights.config
        shared = config.n_head // config.kv_heads
        heads = min(4, _power_of_two(shared))
        width = _power_of_two(config.head_dim)
        tiles = config.kv_heads * -(-shared // heads)
        warps, block = choose_places(count * tiles, self._weights.dtype, self._processors)
        block = min(block, warps * 1024 // (heads * width))  # for sums to fit into registers
        self._launch(
            self._attention, (count, tiles), warps, 1, True,
            self._qkv, self._weights.rope, keys, values, self._attended, position,
            position if first is None else first, keys.shape[2], config.head_dim**-0.5 * log2(euler),
            H=config.n_head, G=config.kv_heads, E=config.head_dim, E_PADDED=width, HEADS=heads,
            BLOCK=max(2, block), PADDED=first is not None,
        )  # fmt: skip


def _factor(matrix: Matrix) -> Tensor:
    """Of the outputs; any tensor, if there is none."""
    return matrix.values if matrix.scale is None else matrix.scale


def _width(squares: int, tile: Tile) -> int:
    """How many sums of squares of a row a program keeps in registers: 32 for each of 128 threads."""
    return min(_power_of_two(squares), 4096 // tile.rows)


def _power_of_two(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << (number - 1).bit_length()


def _row_counts(rows: int) -> list[int]:
    """Numbers of rows up to ``rows`` at which tiles are chosen anew, and ``rows`` itself."""
    return [count for count in (16, 64, WIDEST) if count < rows] + [rows]
