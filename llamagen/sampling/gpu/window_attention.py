"""Triton kernel for the attention of several new tokens of a row, by matrix products. Importing it needs Triton.

Shapes: R rows, T new tokens of a row (the window), H query heads, G key-value heads, E head width, P tokens of cache
capacity, Q queries of a program, N keys of an iteration.
"""

import triton
import triton.language as tl

from llamagen.sampling.gpu.attention import rotated
from llamagen.sampling.gpu.kernels import wait


@triton.jit
def _add_block(query, keys, values, visible, best, weight, mixed, scale):
    """Add a block of keys and values to a running softmax.

    Args:
        query: (Q, E).
        keys: (N, E), in the dtype of ``query``.
        values: (N, E), finite, because those that a query does not see are multiplied by 0; in the same dtype.
        visible: (Q, N), whether a query attends to a key.
        best, weight: (Q,) float32, largest score and sum of the exponentials so far.
        mixed: (Q, E) float32, sum of the values so far, each times its exponential.
        scale: factor of the scores.
    """
    score = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
    score = tl.where(visible, score, -1e30)
    better = tl.maximum(best, tl.max(score, 1))
    keep = tl.exp2(best - better)
    add = tl.where(visible, tl.exp2(score - better[:, None]), 0.0)
    weight = weight * keep + tl.sum(add, 1)
    mixed = tl.dot(add.to(values.dtype), values, mixed * keep[:, None], input_precision="ieee")
    return better, weight, mixed


@triton.jit
def attend_window(
    qkv, rope, keys, values, out, starts_at, first_at, positions, scale,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, E_PADDED: tl.constexpr, WINDOW: tl.constexpr,
    QUERIES: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Attention of WINDOW new tokens of each row. Grid: R, G, tiles of QUERIES of the heads and tokens of a group.

    Keys and values are read once for all queries of a program. The new tokens are rotated by each program that needs
    them, so no program waits for another one; those of the first tile write them.

    Args:
        qkv: (R T, (H + 2 G) E) float32, before rotation.
        rope: (positions, E / 2, 2) float32.
        keys, values: (R, G, P, E), cache of a layer; the cached tokens are read, the new ones are written.
        out: (R T, H E).
        starts_at: (R,) integers, number of cached tokens of each row. Tokens beyond the capacity are not written.
        first_at: (R,) int32, first cached token that the row attends to; read only if PADDED.
        positions: P.
        scale: E ** -0.5 * log2(e).
    """
    wait(EARLY)
    row, group, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    shared: tl.constexpr = H // G
    width: tl.constexpr = (H + 2 * G) * E
    start = tl.load(starts_at + row).to(tl.int32)
    first = 0
    if PADDED:
        first = tl.minimum(tl.load(first_at + row), start)
    cache = (row * G + group).to(tl.int64) * positions * E
    keys += cache
    values += cache
    qkv += row.to(tl.int64) * (WINDOW * width)
    column = tl.arange(0, E_PADDED)[None, :]
    inside = column < E
    item = tile * QUERIES + tl.arange(0, QUERIES)
    live = (item < shared * WINDOW)[:, None] & inside
    token, head = item % WINDOW, tl.minimum(item // WINDOW, shared - 1)
    at = token * width + (group * shared + head) * E
    places = tl.minimum(start + token, positions - 1)[:, None]
    query = rotated(qkv, rope, at[:, None], column, live, places, E).to(keys.dtype.element_ty)

    best = tl.full((QUERIES,), -1e30, tl.float32)
    weight = tl.zeros((QUERIES,), tl.float32)
    mixed = tl.zeros((QUERIES, E_PADDED), tl.float32)
    lane = tl.arange(0, BLOCK)
    for begin in range(first, start, BLOCK):
        place = begin + lane
        valid = (place < start)[:, None] & inside
        old_keys = tl.load(keys + place[:, None] * E + column, mask=valid, other=0.0)
        old_values = tl.load(values + place[:, None] * E + column, mask=valid, other=0.0)
        visible = (place < start)[None, :] & (item >= 0)[:, None]
        best, weight, mixed = _add_block(query, old_keys, old_values, visible, best, weight, mixed, scale)
    for begin in range(0, WINDOW, BLOCK):
        other = begin + lane
        place = tl.minimum(start + other, positions - 1)[:, None]
        valid = (other < WINDOW)[:, None] & inside
        at_key = other[:, None] * width + (H + group) * E
        new_keys = rotated(qkv, rope, at_key, column, valid, place, E).to(keys.dtype.element_ty)
        new_values = tl.load(qkv + at_key + G * E + column, mask=valid, other=0.0).to(values.dtype.element_ty)
        if tile == 0:
            written = valid & (start + other < positions)[:, None]
            tl.store(keys + place * E + column, new_keys, mask=written)
            tl.store(values + place * E + column, new_values, mask=written)
        # A wrong guess may have values that are not finite. The codes before it must not notice: its values become 0,
        # and its key NaN, so that the tokens after it are NaN as they should be.
        infinite = tl.max(tl.where(tl.abs(new_values.to(tl.float32)) < float("inf"), 0, 1), 1)[:, None] > 0
        new_values = tl.where(infinite, 0.0, new_values)
        new_keys = tl.where(infinite, float("nan"), new_keys)
        visible = other[None, :] <= token[:, None]
        best, weight, mixed = _add_block(query, new_keys, new_values, visible, best, weight, mixed, scale)
    at_out = (row.to(tl.int64) * WINDOW + token[:, None]) * (H * E) + (group * shared + head)[:, None] * E + column
    tl.store(out + at_out, (mixed / weight[:, None]).to(out.dtype.element_ty), mask=live)
