"""The gradient of a row of logits, written by the program that owns the row; geometry and units as in `row`.

With v_j = log2 p_j the gradient is p_j * (a + b * v_j) times the softcap's slope, for every column but the target's,
whose value depends on 1 - p_t and is worked out once by the caller. Output may be the memory of the input: a thread
overwrites only what it has read itself, and nobody reads another thread's elements.
"""

import triton
import triton.language as tl

from fastgrpo.kernels.numerics import LOG2E
from fastgrpo.kernels.row import (
    FLOOR,
    aligned_start,
    edge_block,
    edge_blocks,
    edge_columns,
    load_block,
    load_edge,
    tile_offsets,
    units,
    widen,
)

# Beyond this |lse * c| the folded form u * c - lse * c loses too many digits of p, and finally overflows.
FOLD_LIMIT = tl.constexpr(1024.0)


@triton.jit
def _terms(v, slope, a, b, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr):
    p = tl.exp2(v)
    gradient = p * tl.fma(tl.maximum(v, FLOOR), b, a) if ENTROPY else p * a
    if SOFTCAP:
        gradient = gradient * slope
    return gradient


@triton.jit
def zero_row(
    out_ptr, n_cols, ALIGNED: tl.constexpr, SAME_SHIFT: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr
):  # fmt: skip
    """Fill a row with zeros."""
    TILE: tl.constexpr = ROWS * VEC
    start_ptr, shift = aligned_start(out_ptr, ALIGNED and SAME_SHIFT, VEC)
    offsets = tile_offsets(ROWS, VEC)
    zeros = tl.zeros([ROWS, VEC], out_ptr.dtype.element_ty)
    last = (n_cols + shift - 1) // TILE
    for edge in range(0, tl.where(last > 0, 2, 1)):
        tile = tl.where(edge == 0, 0, last)
        _, inside = edge_columns(tile, shift, n_cols, ALIGNED and SAME_SHIFT, ROWS, VEC)
        tl.store(start_ptr + tile * TILE + offsets, zeros, mask=inside)
    for tile in range(1, last):
        tl.store(start_ptr + tile * TILE + offsets, zeros)


@triton.jit
def row_gradient(
    row_ptr, out_ptr, target, n_cols, c, inner, softcap, logprob, lse, a, b, d_target,
    ALIGNED: tl.constexpr, SAME_SHIFT: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
    ROWS: tl.constexpr, VEC: tl.constexpr, LOADS: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """Write p_j * (a + b * log2 p_j) * slope_j, and d_target * slope_t in the target's column, from the row's end back.

    Backwards, because after `row_statistics` the end of the row is what the cache still holds.
    """
    BLOCK: tl.constexpr = ROWS * VEC * LOADS
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    base_ptr, shift = aligned_start(row_ptr, ALIGNED, VEC)
    if ALIGNED and SAME_SHIFT:
        base_out_ptr = out_ptr
    elif SAME_SHIFT:
        base_out_ptr = tl.multiple_of(out_ptr - shift, 16)
    else:
        base_out_ptr = out_ptr - shift
    offsets = tile_offsets(ROWS, VEC)
    last, edges, skipped, main_end = edge_blocks(target, shift, n_cols, BLOCK)
    k = lse * c
    folds = tl.abs(k) < FOLD_LIMIT
    # Elsewhere (and where k is NaN) every block is an edge, and an edge subtracts before it scales. It subtracts the
    # nearer of lse and the target's u: at u = 1e37 lse itself has lost log(sum).
    main_end = tl.where(folds, main_end, 1)
    edges = tl.where(folds, edges, last + 1)
    origin, beyond = lse, lse * 0.0
    if not folds:
        u_target, _ = units(tl.load(row_ptr + target).to(c.dtype), inner, softcap, SOFTCAP)
        tl.debug_barrier()  # all threads have read the target's logit before one of them may overwrite it
        if tl.abs(logprob * LOG2E) < tl.abs(k):
            origin, beyond = u_target, logprob * LOG2E

    for i in range(1, main_end):
        forward = main_end - i
        block = tl.where(forward >= skipped, forward + 1, forward)
        words = load_block(base_ptr + block * BLOCK, ROWS, VEC, LOADS, EVICTION)
        for part in tl.static_range(LOADS):
            u, slope = units(widen(words[part], c.dtype), inner, softcap, SOFTCAP)
            gradient = _terms(tl.fma(u, c, -k), slope, a, b, SOFTCAP, ENTROPY)
            tile_ptr = base_out_ptr + block * BLOCK + part * (ROWS * VEC) + offsets
            tl.store(tile_ptr, gradient.to(dtype))

    for edge in range(0, edges):
        block = tl.where(folds, edge_block(edge, skipped, last), edge)
        tiles = load_edge(base_ptr, block, shift, n_cols, ALIGNED, ROWS, VEC, LOADS, EVICTION)
        for part in tl.static_range(LOADS):
            columns, inside = edge_columns(block * LOADS + part, shift, n_cols, ALIGNED, ROWS, VEC)
            u, slope = units(tiles[part].to(c.dtype), inner, softcap, SOFTCAP)
            gradient = _terms(tl.fma(u - origin, c, beyond), slope, a, b, SOFTCAP, ENTROPY)
            at_target = d_target
            if SOFTCAP:
                at_target = d_target * slope
            gradient = tl.where(columns == target, at_target, gradient)
            tile_ptr = base_out_ptr + block * BLOCK + part * (ROWS * VEC) + offsets
            tl.store(tile_ptr, gradient.to(dtype), mask=inside)
