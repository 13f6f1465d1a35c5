"""Triton kernels of a decode step, except attention. Importing this module needs Triton.

A step is bound by latency and memory bandwidth. So kernels prefetch the weights of their program before they wait for
the previous kernel (``EARLY``, programmatic dependent launch), and exchange activations in the dtype of the products.
There are no floating-point atomics: sums over programs have a fixed order.

Shapes: M rows (one new token each), N outputs and K inputs of a layer, D model width.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# The instruction does not allow a size of 0, so it is predicated on the size.
PREFETCH = tl.constexpr(
    "{ .reg .pred some; setp.ne.u32 some, $2, 0; @some cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }"
)


@triton.jit
def wait(EARLY: tl.constexpr):
    """Wait for the previous kernel, and let the next one start to prefetch its weights."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def _prefetch_weights(
    weight, first_output, first_input,
    N: tl.constexpr, K: tl.constexpr, OUTPUTS: tl.constexpr, SPAN: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Prefetch ``SPAN`` inputs, from ``first_input`` on, of a tile of weight rows into the L2 cache.

    Each of LANES threads prefetches one of the LANES / OUTPUTS pieces of a row.
    """
    item: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
    pieces: tl.constexpr = LANES // OUTPUTS
    piece: tl.constexpr = (SPAN * item // pieces) // 16 * 16  # bytes; a multiple of 16, as the addresses must be
    if piece > 0 and K * item % 16 == 0:
        lane = tl.arange(0, LANES)
        output = tl.minimum(first_output + lane // pieces, N - 1)
        begin = first_input * item + (lane % pieces) * piece
        size = tl.maximum(tl.minimum(K * item - begin, piece), 0)
        address = weight.to(tl.int64) + output.to(tl.int64) * (K * item) + begin
        tl.inline_asm_elementwise(PREFETCH, "=r,l,r", [address, size], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _products(
    x, a, b, count, first_row, first_output, start, stop,
    N: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Sums over the inputs from ``start`` to ``stop`` of x[m, k] a[n, k], and of x[m, k] b[n, k] if gated.

    With PARTS > 1 each warp sums a part of every INPUTS inputs. With few rows a sum is a chain of dependent products,
    so several shorter chains are faster than one.

    Args:
        x: (M, K).
        a, b: (N, K), in the dtype of ``x`` or int8.
        count: M; further rows are read as zeros.
        first_row, first_output, start, stop: the tile to compute.

    Returns:
        Two float32 (ROWS, OUTPUTS); the same one twice if not gated.
    """
    rows = first_row + tl.arange(0, ROWS)
    offset = tl.arange(0, OUTPUTS)
    if N % OUTPUTS != 0:
        offset = tl.minimum(offset, N - 1 - first_output)  # outputs beyond the last one repeat it
    base = first_output.to(tl.int64) * K
    a += base
    b += base
    if PARTS == 1:
        inputs = tl.arange(0, INPUTS)
        x_inputs = inputs[None, :]
        w_inputs = inputs[:, None]
        live = (rows < count)[:, None]
        x_at = rows[:, None] * K + x_inputs
        w_at = offset[None, :] * K + w_inputs
        sum_a = tl.zeros((ROWS, OUTPUTS), tl.float32)
    else:
        part: tl.constexpr = INPUTS // PARTS
        inputs = tl.arange(0, PARTS)[:, None] * part + tl.arange(0, part)[None, :]
        x_inputs = inputs[:, None, :]
        w_inputs = inputs[:, :, None]
        live = (rows < count)[None, :, None]
        x_at = rows[None, :, None] * K + x_inputs
        w_at = offset[None, None, :] * K + w_inputs
        sum_a = tl.zeros((PARTS, ROWS, OUTPUTS), tl.float32)
    sum_b = sum_a
    for k in range(start, stop, INPUTS):
        if EVEN:
            block_x = tl.load(x + x_at + k, mask=live, other=0.0)
            block_a = tl.load(a + w_at + k)
            if GATED:
                block_b = tl.load(b + w_at + k)
        else:
            block_x = tl.load(x + x_at + k, mask=live & (x_inputs < K - k), other=0.0)
            block_a = tl.load(a + w_at + k, mask=w_inputs < K - k, other=0)
            if GATED:
                block_b = tl.load(b + w_at + k, mask=w_inputs < K - k, other=0)
        sum_a = tl.dot(block_x, block_a.to(block_x.dtype), sum_a, input_precision="ieee")
        if GATED:
            sum_b = tl.dot(block_x, block_b.to(block_x.dtype), sum_b, input_precision="ieee")
    if PARTS > 1:
        sum_a = tl.sum(sum_a, 0)
        if GATED:
            sum_b = tl.sum(sum_b, 0)
    if not GATED:
        sum_b = sum_a
    return sum_a, sum_b


@triton.jit
def _squares(
    squares, count, first_row, begin, TILES: tl.constexpr, STRIDE: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sums of squares of WIDTH tiles of each row from ``begin`` on, (ROWS, WIDTH) float32."""
    rows = first_row + tl.arange(0, ROWS)
    tile = begin + tl.arange(0, WIDTH)
    live = (rows < count)[:, None] & (tile < TILES)[None, :]
    return tl.load(squares + rows[:, None] * STRIDE + tile[None, :], mask=live, other=0.0)


@triton.jit
def _rstd(
    leading, squares, count, first_row, eps, K: tl.constexpr, TILES: tl.constexpr, STRIDE: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Reciprocal root mean squares of the rows, (ROWS,); ``leading`` holds the sums of the first WIDTH tiles."""
    total = tl.sum(leading, 1)
    for begin in tl.static_range(WIDTH, TILES, WIDTH):
        total += tl.sum(_squares(squares, count, first_row, begin, TILES, STRIDE, ROWS, WIDTH), 1)
    return tl.rsqrt(total / K + eps)


@triton.jit
def prepare(
    embedded, gain, x, scaled, squares,
    D: tl.constexpr, D_PADDED: tl.constexpr, TILES_PADDED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Copy a row of the embedded input, and compute the inputs of the first norm as :func:`linear_residual` does.

    footgun: this kernel must be launched normally, after all earlier work. Only then may the later kernels of the step
    read the position and the cached tokens before they wait.

    Args:
        embedded: (M, D) float32.
        gain: (D,) float32, weight of the norm.
        x: (M, D) float32, receives the copy.
        scaled: (M, D), receives x times gain.
        squares: (M, TILES_PADDED) float32, receives the sum of squares in the first column and zeros in the others.
    """
    if EARLY:
        gdc_launch_dependents()
    row = tl.program_id(0)
    column = tl.arange(0, D_PADDED)
    live = column < D
    values = tl.load(embedded + row * D + column, mask=live, other=0.0)
    tl.store(x + row * D + column, values, mask=live)
    gains = tl.load(gain + column, mask=live, other=0.0)
    tl.store(scaled + row * D + column, (values * gains).to(scaled.dtype.element_ty), mask=live)
    tile = tl.arange(0, TILES_PADDED)
    tl.store(squares + row * TILES_PADDED + tile, tl.where(tile == 0, tl.sum(values * values, 0), 0.0))


@triton.jit(do_not_specialize=["count"])
def norm_linear(
    scaled, squares, weight, factor, out, count, eps,
    N: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr, TILES_PADDED: tl.constexpr, INT8: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, PARTS: tl.constexpr,
    WIDTH: tl.constexpr, SPAN: tl.constexpr, LANES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out[m, n] = rstd[m] * sum over k of scaled[m, k] weight[n, k]. Grid: tiles of N, tiles of M.

    Args:
        scaled: (M, K), x times the weight of the norm.
        squares: (M, TILES_PADDED) float32, sums of squares of the tiles of x.
        weight: (N, K).
        factor: (N,) float32 scales if int8, else not read.
        out: (M, N) float32.
        count: M.
        eps: added to the mean square.
    """
    first_output, first_row = tl.program_id(0) * OUTPUTS, tl.program_id(1) * ROWS
    if EARLY:
        _prefetch_weights(weight, first_output, 0, N, K, OUTPUTS, SPAN, LANES)
    wait(EARLY)
    # Loaded before the products, reduced after them. Sums that do not fit into registers are loaded after them, too.
    leading = _squares(squares, count, first_row, 0, TILES, TILES_PADDED, ROWS, WIDTH)
    total, _ = _products(
        scaled, weight, weight, count, first_row, first_output, 0, K,
        N, K, False, K % INPUTS == 0, ROWS, OUTPUTS, INPUTS, PARTS,
    )  # fmt: skip
    rows, outputs = first_row + tl.arange(0, ROWS), first_output + tl.arange(0, OUTPUTS)
    total *= _rstd(leading, squares, count, first_row, eps, K, TILES, TILES_PADDED, ROWS, WIDTH)[:, None]
    if INT8:
        total *= tl.load(factor + outputs, mask=outputs < N, other=0.0)[None, :]
    at = rows[:, None].to(tl.int64) * N + outputs[None, :]
    tl.store(out + at, total, mask=(rows < count)[:, None] & (outputs < N)[None, :])


@triton.jit
def normalise_heads(
    qkv, q_gain, k_gain, eps,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, E_PADDED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Divide each query and key by its root mean square, and multiply it by a gain. Grid: M, H + G.

    Args:
        qkv: (M, (H + 2 G) E) float32, changed in place.
        q_gain: (E,) float32, gain of the queries.
        k_gain: (E,) float32, gain of the keys.
        eps: added to the mean square.
    """
    wait(EARLY)
    row, head = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, E_PADDED)
    inside = column < E
    at = qkv + row * ((H + 2 * G) * E) + head * E + column
    values = tl.load(at, mask=inside, other=0.0)
    of_query = tl.load(q_gain + column, mask=inside, other=0.0)
    of_key = tl.load(k_gain + column, mask=inside, other=0.0)
    gain = tl.where(head < H, of_query, of_key)
    tl.store(at, values * tl.rsqrt(tl.sum(values * values, 0) / E + eps) * gain, mask=inside)


@triton.jit(do_not_specialize=["count"])
def norm_gated(
    scaled, squares, w1, w3, factor1, factor3, out, count, eps,
    N: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr, TILES_PADDED: tl.constexpr, INT8: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, PARTS: tl.constexpr,
    WIDTH: tl.constexpr, SPAN: tl.constexpr, LANES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """silu(a) * b in the dtype of ``scaled``, where a and b are :func:`norm_linear` with w1 and w3."""
    first_output, first_row = tl.program_id(0) * OUTPUTS, tl.program_id(1) * ROWS
    if EARLY:
        _prefetch_weights(w1, first_output, 0, N, K, OUTPUTS, SPAN, LANES)
        _prefetch_weights(w3, first_output, 0, N, K, OUTPUTS, SPAN, LANES)
    wait(EARLY)
    # Loaded before the products, reduced after them. Sums that do not fit into registers are loaded after them, too.
    leading = _squares(squares, count, first_row, 0, TILES, TILES_PADDED, ROWS, WIDTH)
    gate, value = _products(
        scaled, w1, w3, count, first_row, first_output, 0, K,
        N, K, True, K % INPUTS == 0, ROWS, OUTPUTS, INPUTS, PARTS,
    )  # fmt: skip
    rows, outputs = first_row + tl.arange(0, ROWS), first_output + tl.arange(0, OUTPUTS)
    rstd = _rstd(leading, squares, count, first_row, eps, K, TILES, TILES_PADDED, ROWS, WIDTH)[:, None]
    gate *= rstd
    value *= rstd
    if INT8:
        gate *= tl.load(factor1 + outputs, mask=outputs < N, other=0.0)[None, :]
        value *= tl.load(factor3 + outputs, mask=outputs < N, other=0.0)[None, :]
    result = gate / (1.0 + tl.exp(-gate)) * value
    at = rows[:, None] * N + outputs[None, :]
    live = (rows < count)[:, None] & (outputs < N)[None, :]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=live)


@triton.jit
def _finish_residual(
    total, factor, gain, x, scaled, squares, count, first_row, first_output,
    N: tl.constexpr, TILES_PADDED: tl.constexpr, INT8: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Add a tile of products to x, and compute the inputs of the next norm from the sum."""
    rows, outputs = first_row + tl.arange(0, ROWS), first_output + tl.arange(0, OUTPUTS)
    if INT8:
        total *= tl.load(factor + outputs, mask=outputs < N, other=0.0)[None, :]
    at = rows[:, None] * N + outputs[None, :]
    live = (rows < count)[:, None] & (outputs < N)[None, :]
    total += tl.load(x + at, mask=live, other=0.0)
    gains = tl.load(gain + outputs, mask=outputs < N, other=0.0)
    tl.store(x + at, total, mask=live)
    tl.store(scaled + at, (total * gains[None, :]).to(scaled.dtype.element_ty), mask=live)
    total = tl.where(live, total, 0.0)
    tile = first_output // OUTPUTS
    tl.store(squares + rows * TILES_PADDED + tile, tl.sum(total * total, 1), mask=rows < count)


@triton.jit(do_not_specialize=["count"])
def linear_residual(
    hidden, weight, factor, gain, x, scaled, squares, partial, arrived, count,
    N: tl.constexpr, K: tl.constexpr, TILES_PADDED: tl.constexpr, INT8: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr,
    SPAN: tl.constexpr, LANES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """x[m, n] += sum over k of hidden[m, k] weight[n, k]. Grid: tiles of N, tiles of M, splits of K.

    With SPLITS > 1 the last program to finish a tile adds the partial sums of all of them, in the order of K.

    Args:
        hidden: (M, K).
        weight: (N, K).
        factor: (N,) float32 scales if int8, else not read.
        gain: (N,) float32, weight of the next norm.
        x: (M, N) float32.
        scaled: (M, N), receives x times gain.
        squares: (M, TILES_PADDED) float32, receives the sum of squares of each tile of x.
        partial: float32, ROWS × OUTPUTS for each program.
        arrived: int32, 0 for each tile at the start and at the end.
        count: M.
    """
    first_output, first_row = tl.program_id(0) * OUTPUTS, tl.program_id(1) * ROWS
    split_inputs: tl.constexpr = (K + INPUTS * SPLITS - 1) // (INPUTS * SPLITS) * INPUTS
    split = tl.program_id(2)
    start = split * split_inputs
    if EARLY:
        _prefetch_weights(weight, first_output, start, N, K, OUTPUTS, SPAN, LANES)
    wait(EARLY)
    if SPLITS == 1:
        total, _ = _products(
            hidden, weight, weight, count, first_row, first_output, 0, K,
            N, K, False, K % INPUTS == 0, ROWS, OUTPUTS, INPUTS, PARTS,
        )  # fmt: skip
        _finish_residual(
            total, factor, gain, x, scaled, squares, count, first_row, first_output,
            N, TILES_PADDED, INT8, ROWS, OUTPUTS,
        )  # fmt: skip
    else:
        total, _ = _products(
            hidden, weight, weight, count, first_row, first_output, start, tl.minimum(start + split_inputs, K),
            N, K, False, K % INPUTS == 0, ROWS, OUTPUTS, INPUTS, PARTS,
        )  # fmt: skip
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        within = tl.arange(0, ROWS)[:, None] * OUTPUTS + tl.arange(0, OUTPUTS)[None, :]
        partial += tile * (SPLITS * ROWS * OUTPUTS)
        tl.store(partial + split * (ROWS * OUTPUTS) + within, total)
        tl.debug_barrier()  # all threads must have stored before one of them counts this program as arrived
        before = tl.atomic_add(arrived + tile, 1, sem="acq_rel", scope="gpu")
        if before == SPLITS - 1:
            total = tl.zeros((ROWS, OUTPUTS), tl.float32)
            for other in tl.static_range(SPLITS):
                total += tl.load(partial + other * (ROWS * OUTPUTS) + within, cache_modifier=".cg")
            _finish_residual(
                total, factor, gain, x, scaled, squares, count, first_row, first_output,
                N, TILES_PADDED, INT8, ROWS, OUTPUTS,
            )  # fmt: skip
            tl.store(arrived + tile, 0)
