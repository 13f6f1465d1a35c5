"""Triton kernels for attention, one program for each new token and heads. Importing this module needs Triton.

Shapes: R rows of the cache, T new tokens of a row (the window), M = R · T new tokens, H query heads, G key-value heads,
E head width, P tokens of cache capacity.
"""

import triton
import triton.language as tl

from llamagen.sampling.gpu.kernels import wait


@triton.jit
def rotated(qkv, rope, at, column, live, position, E: tl.constexpr):
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
def append(
    qkv, rope, keys, values, starts_at, positions,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, E_PADDED: tl.constexpr, WINDOW: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Write the keys and values of WINDOW new tokens of each row into the cache. Grid: M, G.

    Args:
        qkv: (M, (H + 2 G) E) float32, before rotation.
        rope: (positions, E / 2, 2) float32.
        keys, values: (R, G, P, E), cache of a layer.
        starts_at: (R,) integers, number of cached tokens of each row. Tokens beyond the capacity are not written.
        positions: P.
    """
    wait(EARLY)
    item, group = tl.program_id(0), tl.program_id(1)
    row = item // WINDOW
    position = tl.load(starts_at + row).to(tl.int32) + item % WINDOW
    if position < positions:
        column = tl.arange(0, E_PADDED)
        inside = column < E
        new = qkv + item * ((H + 2 * G) * E)
        at = ((row * G + group).to(tl.int64) * positions + position) * E + column
        key = rotated(new, rope, (H + group) * E, column, inside, position, E)
        value = tl.load(new + (H + G + group) * E + column, mask=inside, other=0.0)
        tl.store(keys + at, key.to(keys.dtype.element_ty), mask=inside)
        tl.store(values + at, value.to(values.dtype.element_ty), mask=inside)


@triton.jit
def attend(
    qkv, rope, keys, values, out, position_at, first_at, positions, scale,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, E_PADDED: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr, WINDOW: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Attention of a new token, for HEADS heads that share keys. Grid: M, tiles of heads.

    The cached tokens are read in blocks of BLOCK. Each of the BLOCK lanes reads one token per block and keeps a running
    softmax over its tokens, so threads exchange nothing before the end. A block is loaded while the previous one is
    added. The first block is loaded before the new query and key are ready.

    Args:
        qkv: (M, (H + 2 G) E) float32, before rotation.
        rope: (positions, E / 2, 2) float32.
        keys, values: (R, G, P, E), cache of a layer; the cached tokens are read, the new one is written.
        out: (M, H E).
        position_at: number of cached tokens, which is the position of the new one: pointer to an integer if WINDOW is
            0, which means one new token for each row, all at the same position; otherwise (R,) integers.
        first_at: (R,) int32, first cached token that the row attends to; read only if PADDED.
        positions: P.
        scale: E ** -0.5 * log2(e).
        WINDOW: T. With several new tokens :func:`append` must have written all of them: then a token finds those before
            it in the cache, and its sums are the same as with one token in each pass.
    """
    item = tl.program_id(0)
    if WINDOW == 0:
        row = item
        position = tl.load(position_at).to(tl.int32)
    else:
        row = item // WINDOW
        position = tl.load(position_at + row).to(tl.int32) + item % WINDOW
        position = tl.minimum(position, positions - 1)  # the result of a token beyond the capacity is not used
    if WINDOW > 1:
        wait(EARLY)  # for the tokens that this pass has written
    shared: tl.constexpr = H // G
    tiles: tl.constexpr = (shared + HEADS - 1) // HEADS
    group, tile = tl.program_id(1) // tiles, tl.program_id(1) % tiles
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
    # Without a window the cached tokens were written before this step, so they may be read before the wait.
    valid = (lane < position - first)[None, :, None] & inside[None, None, :]
    next_keys = tl.load(keys + first * E + within, mask=valid, other=0.0)
    next_values = tl.load(values + first * E + within, mask=valid, other=0.0)
    if WINDOW <= 1:
        wait(EARLY)

    head = tile * HEADS + tl.arange(0, HEADS)
    live = (head < shared)[:, None] & inside[None, :]
    new = item * ((H + 2 * G) * E)
    at = new + (group * shared + head)[:, None] * E
    query = rotated(qkv, rope, at, column[None, :], live, position, E) * scale
    if WINDOW > 1:
        key = tl.load(keys + position * E + column, mask=inside, other=0.0)
        value = tl.load(values + position * E + column, mask=inside, other=0.0)
    else:
        key = rotated(qkv, rope, new + (H + group) * E, column, inside, position, E).to(keys.dtype.element_ty)
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
    out_at = item * (H * E) + (group * shared + head)[:, None] * E + column[None, :]
    tl.store(out + out_at, (result / total[:, None]).to(out.dtype.element_ty), mask=live)
