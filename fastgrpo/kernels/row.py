"""One pass over a row of logits by one program: statistics, and the gradient written back.

A tile is ROWS x VEC elements, VEC elements being 16 bytes, so each thread loads 128 bits and adds up within itself;
threads meet once per row. A block is LOADS tiles, loaded together. Blocks start at the 16-byte boundary at or below the
row (`shift` elements before it). Block 0, the block of the target and the last block are "edges": they alone compare
columns, to mask what lies outside the row and to treat the target apart. The main loop runs over the others without a
comparison.

Units as in the reference: u = z or softcap * tanh(scale * z / softcap), x = u * c / log2(e), v = u * c - k in base 2.
"""

import triton
import triton.language as tl

from fastgrpo.kernels.numerics import LN2, exp, log1p_unit, tanh_and_slope

# v = -inf has exp2(v) = 0, but 0 * -inf is NaN: v is floored before it is multiplied. exp2(-2000) is 0 in float64 too.
FLOOR = tl.constexpr(-2000.0)
# The fast pass is kept if the row's sum of exp2(v) stays between these: no overflow, and v small enough to be exact.
SUM_LOW = tl.constexpr(0.5)
SUM_HIGH = tl.constexpr(1.0e12)


@triton.jit
def units(z, inner, softcap, SOFTCAP: tl.constexpr):
    """Return u and du/dz up to a constant; inner = scale / softcap."""
    u, slope = z, z
    if SOFTCAP:
        tanh, slope = tanh_and_slope(z * inner)
        u = softcap * tanh
    return u, slope


@triton.jit
def row_pointer(base_ptr, row, stride, ALIGNED: tl.constexpr, VEC: tl.constexpr):
    """Start of a row (int64). The hint has to sit on an operation: on a function's argument it would be lost."""
    offset = row * stride
    if ALIGNED:
        offset = tl.multiple_of(offset, VEC)
    return base_ptr + offset


@triton.jit
def aligned_start(row_ptr, ALIGNED: tl.constexpr, VEC: tl.constexpr):
    """Return the 16-byte boundary at or below row_ptr and how many elements it lies before it."""
    if ALIGNED:
        start_ptr, shift = row_ptr, 0
    else:
        shift = (row_ptr.to(tl.int64) % 16).to(tl.int32) * VEC // 16
        start_ptr = tl.multiple_of(row_ptr - shift, 16)
    return start_ptr, shift


@triton.jit
def tile_offsets(ROWS: tl.constexpr, VEC: tl.constexpr):
    """Offsets [ROWS, VEC] of a tile's elements, 16 consecutive bytes in each row."""
    return tl.arange(0, ROWS)[:, None] * VEC + tl.arange(0, VEC)[None, :]


@triton.jit
def load_block(
    block_ptr, ROWS: tl.constexpr, VEC: tl.constexpr, LOADS: tl.constexpr, EVICTION: tl.constexpr
):  # fmt: skip
    """The LOADS tiles of a block inside the row; all loads are in flight before the first tile is used.

    bfloat16 comes as pairs in 32-bit words, which `widen` takes apart with one instruction per element, not 1.5.
    """
    tiles = ()
    for part in tl.static_range(LOADS):
        tile_ptr = block_ptr + part * (ROWS * VEC)
        if block_ptr.dtype.element_ty == tl.bfloat16:
            pair_ptr = tile_ptr.to(tl.pointer_type(tl.int32)) + tile_offsets(ROWS, VEC // 2)
            tile = tl.load(pair_ptr, eviction_policy=EVICTION)
        else:
            tile = tl.load(tile_ptr + tile_offsets(ROWS, VEC), eviction_policy=EVICTION)
        tiles = tiles + (tile,)  # noqa: RUF005
    return tiles


@triton.jit
def widen(tile, dtype: tl.constexpr):
    """A tile of `load_block` as numbers of the accumulation dtype."""
    if tile.dtype == tl.int32:
        even = (tile << 16).to(tl.float32, bitcast=True)
        odd = (tile & -65536).to(tl.float32, bitcast=True)
        wide = tl.join(even, odd).reshape(tile.shape[0], 2 * tile.shape[1])
    else:
        wide = tile.to(dtype)
    return wide


@triton.jit
def edge_columns(tile, shift, n_cols, ALIGNED: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr):
    """Columns of a tile that may reach out of the row, and which lie inside it."""
    if ALIGNED:
        n_cols = (
            n_cols // VEC * VEC
        )  # no change: tells the compiler that masks cover 16-byte groups
    columns = tile * (ROWS * VEC) + tile_offsets(ROWS, VEC) - shift
    inside = columns < n_cols
    if not ALIGNED:
        inside = inside & (columns >= 0)
    return columns, inside


@triton.jit
def load_edge(
    base_ptr, block, shift, n_cols, ALIGNED: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr, LOADS: tl.constexpr,
    EVICTION: tl.constexpr,
):  # fmt: skip
    """The LOADS tiles of a block that may reach out of the row, 0 where it does."""
    tiles = ()
    for part in tl.static_range(LOADS):
        tile = block * LOADS + part
        _, inside = edge_columns(tile, shift, n_cols, ALIGNED, ROWS, VEC)
        tile_ptr = base_ptr + tile * (ROWS * VEC) + tile_offsets(ROWS, VEC)
        tiles = tiles + (tl.load(tile_ptr, mask=inside, other=0.0, eviction_policy=EVICTION),)  # noqa: RUF005
    return tiles


@triton.jit
def edge_blocks(target, shift, n_cols, BLOCK: tl.constexpr):
    """Return the last block, the number of edges (1 to 3), the block that the main loop skips and the loop's end.

    The loop takes i + (i >= skipped) for i in 1 .. end.
    """
    last = (n_cols + shift - 1) // BLOCK
    own = (target + shift) // BLOCK
    edges = 1 + tl.where(own > 0, 1, 0) + tl.where(last > own, 1, 0)
    skipped = tl.where(own > 0, own, last)
    main_end = tl.where(skipped < last, last - 1, last)
    return last, edges, skipped, main_end


@triton.jit
def edge_block(edge, skipped, last):
    """Block of an edge: block 0, the target's unless it is block 0, the last unless it is one of the former."""
    return tl.where(edge == 0, 0, tl.where(edge == 1, skipped, last))


@triton.jit
def _add(v, e, s, w, ENTROPY: tl.constexpr):
    s += tl.sum(e, axis=1)
    if ENTROPY:
        w += tl.sum(e * tl.maximum(v, FLOOR), axis=1)
    return s, w


@triton.jit
def _exact_sums(
    base_ptr, shift, target, n_cols, c, inner, softcap,
    ALIGNED: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Sums around the row's exact maximum, scaled after it is subtracted: two plain passes for extreme rows."""
    offsets = tile_offsets(ROWS, VEC)
    tiles = (n_cols + shift - 1) // (ROWS * VEC) + 1
    top = tl.zeros([ROWS], c.dtype) - float("inf")
    for tile in range(0, tiles):
        _, inside = edge_columns(tile, shift, n_cols, ALIGNED, ROWS, VEC)
        z = tl.load(base_ptr + tile * (ROWS * VEC) + offsets, mask=inside, other=0.0)
        u, _ = units(z.to(c.dtype), inner, softcap, SOFTCAP)
        top = tl.maximum(top, tl.max(tl.where(inside, u, -float("inf")), axis=1))
    u_max = tl.max(top, axis=0)
    s = tl.zeros([ROWS], c.dtype)
    w = tl.zeros([ROWS], c.dtype)
    for tile in range(0, tiles):
        columns, inside = edge_columns(tile, shift, n_cols, ALIGNED, ROWS, VEC)
        z = tl.load(base_ptr + tile * (ROWS * VEC) + offsets, mask=inside, other=0.0)
        u, _ = units(z.to(c.dtype), inner, softcap, SOFTCAP)
        v = tl.where(inside, (u - u_max) * c, FLOOR)
        e = tl.where(inside & (columns != target), tl.exp2(v), 0.0)
        s, w = _add(v, e, s, w, ENTROPY)
    return u_max, tl.sum(s, axis=0), tl.sum(w, axis=0)


@triton.jit
def row_statistics(
    row_ptr, target, n_cols, c, slope, slope_low, inner, softcap,
    ALIGNED: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
    LOADS: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """Log-prob of `target` (a valid column), entropy, and logsumexp in units of u, of one row.

    All terms are exp2(u * c - k) with one k for the row: the larger of the target's value and the maximum of block 0.
    No running maximum is kept; should k turn out too far below the row's maximum, or anything be infinite or NaN, the
    row is summed again around its exact maximum. The target's own term is left out of the sum and joins at the end.
    """
    BLOCK: tl.constexpr = ROWS * VEC * LOADS
    base_ptr, shift = aligned_start(row_ptr, ALIGNED, VEC)
    last, edges, skipped, main_end = edge_blocks(target, shift, n_cols, BLOCK)

    u_target, _ = units(tl.load(row_ptr + target).to(c.dtype), inner, softcap, SOFTCAP)
    tiles = load_edge(base_ptr, 0, shift, n_cols, ALIGNED, ROWS, VEC, LOADS, EVICTION)
    top = tl.zeros([ROWS], c.dtype) - float("inf")
    for part in tl.static_range(LOADS):
        _, inside = edge_columns(part, shift, n_cols, ALIGNED, ROWS, VEC)
        u, _ = units(tiles[part].to(c.dtype), inner, softcap, SOFTCAP)
        top = tl.maximum(top, tl.max(tl.where(inside, u, -float("inf")), axis=1))
    origin = tl.maximum(tl.max(top, axis=0), u_target)
    k = origin * c
    s = tl.zeros([ROWS], c.dtype)
    w = tl.zeros([ROWS], c.dtype)
    for edge in range(
        0, edges
    ):  # block 0 comes again, out of the cache, rather than staying in registers
        block = edge_block(edge, skipped, last)
        edge_tiles = load_edge(base_ptr, block, shift, n_cols, ALIGNED, ROWS, VEC, LOADS, EVICTION)
        for part in tl.static_range(LOADS):
            columns, inside = edge_columns(block * LOADS + part, shift, n_cols, ALIGNED, ROWS, VEC)
            u, _ = units(edge_tiles[part].to(c.dtype), inner, softcap, SOFTCAP)
            v = tl.fma(u, c, -k)
            e = tl.where(inside & (columns != target), tl.exp2(v), 0.0)
            s, w = _add(v, e, s, w, ENTROPY)

    for i in range(1, main_end):
        block = tl.where(i >= skipped, i + 1, i)
        words = load_block(base_ptr + block * BLOCK, ROWS, VEC, LOADS, EVICTION)
        for part in tl.static_range(LOADS):
            u, _ = units(widen(words[part], c.dtype), inner, softcap, SOFTCAP)
            v = tl.fma(u, c, -k)
            s, w = _add(v, tl.exp2(v), s, w, ENTROPY)

    rest = tl.sum(s, axis=0)
    weighted = tl.sum(w, axis=0)
    v_target = tl.fma(u_target, c, -k)
    residue = k.to(tl.float64) - origin.to(tl.float64) * c.to(tl.float64)
    total = rest + tl.exp2(v_target)
    if not ((total > SUM_LOW) & (total < SUM_HIGH)):
        origin, rest, weighted = _exact_sums(
            base_ptr, shift, target, n_cols, c, inner, softcap, ALIGNED, SOFTCAP, ENTROPY, ROWS, VEC
        )
        v_target = (u_target - origin) * c
        residue = tl.where(total == total, 0.0, 0.0).to(tl.float64)
    return _finish(rest, weighted, v_target, u_target, origin, residue, c, slope, slope_low)


@triton.jit
def _finish(rest, weighted, v_target, u_target, origin, residue, c, slope, slope_low):
    """Log-prob = -softplus(log rest - x_target), entropy and lse from the sums without the target.

    A handful of float64 operations per row: in float32 the distance of an unlikely target would be rounded thrice.
    `residue` is what rounding left between k and origin * c; slope + slope_low is dx/du.
    """
    log2_rest = tl.log2(rest)
    x_target = (u_target.to(tl.float64) - origin.to(tl.float64)) * (
        slope.to(tl.float64) + slope_low.to(tl.float64)
    )
    excess = (log2_rest.to(tl.float64) + residue) * LN2 - x_target
    correction = log1p_unit(exp(-tl.abs(excess).to(c.dtype)))
    softplus = tl.maximum(excess, 0.0) + correction.to(tl.float64)
    logprob = (0.0 - tl.where(excess == excess, softplus, excess)).to(c.dtype)

    # entropy = log total - mean of v, both counted from the larger of the two parts: a confident row cancels nothing
    larger = tl.maximum(log2_rest, v_target)
    beyond = correction / LN2
    e_target = tl.exp2(v_target)
    total = rest + e_target
    spread = tl.where(
        v_target >= log2_rest,
        v_target * rest - weighted,
        log2_rest * total - (weighted + e_target * tl.maximum(v_target, FLOOR)),
    )
    entropy = (beyond + spread / total) * LN2
    faulty = logprob != logprob
    lse = origin.to(tl.float64) + ((larger + beyond + residue.to(c.dtype)) / c).to(tl.float64)
    return logprob, tl.where(faulty, logprob, entropy), tl.where(faulty, logprob, lse.to(c.dtype))
