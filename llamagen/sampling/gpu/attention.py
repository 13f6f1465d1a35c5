"""Triton kernel for the attention of a decode step. Importing this module needs Triton.

Shapes: M rows (one new token each), H query heads, G key-value heads, E head width, P tokens of cache capacity.
"""

import triton
import triton.language as tl

from llamagen.sampling.gpu.kernels import wait


@triton.jit
def _rotate(qkv, rope, at, column, live, position, E: tl.constexpr):
    """Load the heads at ``qkv + at + column`` and rotate them by the angles of ``position``.

    Even columns become even * cosine − odd * sine, odd columns become odd * cosine + even * sine.
    """
    own = tl.load(qkv + at + column, mask=live, other=0.0)
    other = tl.load(qkv + at + (column ^ 1), mask=live, other=0.0)
    pair = rope + position * E + column // 2 * 2
    cosine = tl.load(pair, mask=column < E, other=0.0)
    sine = tl.load(pair + 1, mask=column < E, other=0.0)
    return own * cosine + tl.where(column % 2 == 0, -other, other) * sine


@triton.jit
def attend(
    qkv, rope, keys, values, out, position_at, first_at, positions, scale,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, E_PADDED: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Attention of the new token of a row, for HEADS heads that share keys. Grid: M, tiles of heads.

    The cached tokens are read in blocks of BLOCK. Each of the BLOCK lanes reads one token per block and keeps a running
    softmax over its tokens, so threads exchange nothing before the end. A block is loaded while the previous one is
    added. The first block is loaded before the new query and key are ready.

    Args:
        qkv: (M, (H + 2 G) E) float32, before rotation.
        rope: (positions, E / 2, 2) float32.
        keys, values: (M, G, P, E), cache of a layer; the cached tokens are read, the new one is written.
        out: (M, H E).
        position_at: pointer to an integer: number of cached tokens, which is the position of the new one.
        first_at: (M,) int32, first cached token that the row attends to; read only if PADDED.
        positions: P.
        scale: E ** -0.5 * log2(e).
    """
    row = tl.program_id(0)
    shared: tl.constexpr = H // G
    tiles: tl.constexpr = (shared + HEADS - 1) // HEADS
    group, tile = tl.program_id(1) // tiles, tl.program_id(1) % tiles
    position = tl.load(position_at).to(tl.int32)
    first = 0
    if PADDED:
        first = tl.minimum(tl.load(first_at + row), position)
    cache = (row * G + group).to(tl.int64) * positions * E
    keys += cache
    values += cache
    column = tl.arange(0, E_PADDED)
    inside = column < E
    lane = tl.arange(0, BLOCK)
    within = lane[None, :, None] * E + column[None, None, :]
    # The cached tokens were written before this step, so they may be read before the wait.
    valid = (lane < position - first)[None, :, None] & inside[None, None, :]
    next_keys = tl.load(keys + first * E + within, mask=valid, other=0.0)
    next_values = tl.load(values + first * E + within, mask=valid, other=0.0)
    wait(EARLY)

    head = tile * HEADS + tl.arange(0, HEADS)
    live = (head < shared)[:, None] & inside[None, :]
    new = row * ((H + 2 * G) * E)
    at = new + (group * shared + head)[:, None] * E
    query = _rotate(qkv, rope, at, column[None, :], live, position, E) * scale
    key = _rotate(qkv, rope, new + (H + group) * E, column, inside, position, E).to(keys.dtype.element_ty)
    value = tl.load(qkv + new + (H + G + group) * E + column, mask=inside, other=0.0)
    value = value.to(values.dtype.element_ty)
    if tile == 0:
        tl.store(keys + position * E + column, key, mask=inside)
        tl.store(values + position * E + column, value, mask=inside)

    best = tl.full((HEADS, BLOCK), -1e30, tl.float32)
    weight = tl.zeros((HEADS, BLOCK), tl.float32)
    mixed = tl.zeros((HEADS, BLOCK, E_PADDED), tl.float32)
    for start in range(first, position, BLOCK):
        old_keys, old_values = next_keys.to(tl.float32), next_values.to(tl.float32)
        following = start + BLOCK
        valid = (lane < position - following)[None, :, None] & inside[None, None, :]
        next_keys = tl.load(keys + following * E + within, mask=valid, other=0.0)
        next_values = tl.load(values + following * E + within, mask=valid, other=0.0)
        filled = (lane < position - start)[None, :]
        score = tl.where(filled, tl.sum(query[:, None, :] * old_keys, 2), -1e30)
        better = tl.maximum(best, score)
        keep = tl.exp2(best - better)
        add = tl.where(filled, tl.exp2(score - better), 0.0)
        best = better
        weight = weight * keep + add
        mixed = mixed * keep[:, :, None] + add[:, :, None] * old_values

    new_score = tl.sum(query * key.to(tl.float32)[None, :], 1)
    top = tl.maximum(tl.max(best, 1), new_score)
    keep = tl.exp2(best - top[:, None])
    add = tl.exp2(new_score - top)
    total = tl.sum(weight * keep, 1) + add
    result = tl.sum(mixed * keep[:, :, None], 1) + add[:, None] * value.to(tl.float32)[None, :]
    out_at = row * (H * E) + (group * shared + head)[:, None] * E + column[None, :]
    tl.store(out + out_at, (result / total[:, None]).to(out.dtype.element_ty), mask=live)
