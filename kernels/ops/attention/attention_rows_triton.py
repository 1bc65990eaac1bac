"""How the attention kernels read and write tiles of rows: as they lie in memory, and queries and keys turned by their places.

A table holds cos and sin of the angle of pair i at a position; column i turns with column i + D / 2 (RoFormer, arXiv
2104.09864, the pairs as in GPT-NeoX). A turned tile has the halves of a head in the halves of its columns, each padded by
itself: products of two turned tiles do not see the difference. Gradients turn by the opposite angle.
"""

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def load_rows(ptr, stride, start, end, ROWS: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr):
    """Return rows start .. start + ROWS of a matrix with D columns, (ROWS, D_PADDED), zeros from row `end` and column D on."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, D_PADDED)
    inside = (row < end - start)[:, None]
    if D < D_PADDED:
        inside = inside & (column < D)[None, :]
    tile = ptr + tl.cast(start, tl.int64) * stride
    return tl.load(tile + row[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(ptr, stride, start, end, x, D: tl.constexpr):
    """Write x (ROWS, D_PADDED) where `load_rows` would read it."""
    row = tl.arange(0, x.shape[0])
    column = tl.arange(0, x.shape[1])
    inside = (row < end - start)[:, None] & (column < D)[None, :]
    tile = ptr + tl.cast(start, tl.int64) * stride
    tl.store(tile + row[:, None] * stride + column[None, :], x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_turned(ptr, stride, rotary_ptr, start, end, ROWS: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr):
    """Return what `load_rows` does, turned by the angles of rows start .. start + ROWS of the table; as it is without one.

    rotary_ptr: (L, D) fp32, L >= end, cosines before sines, or None.
    """
    if rotary_ptr is None:
        x = load_rows(ptr, stride, start, end, ROWS, D, D_PADDED)
    else:
        x0 = load_rows(ptr, stride, start, end, ROWS, D // 2, D_PADDED // 2)
        x1 = load_rows(ptr + D // 2, stride, start, end, ROWS, D // 2, D_PADDED // 2)
        cos, sin = _angles(rotary_ptr, start, end, ROWS, D, D_PADDED)
        y0 = (x0 * cos - x1 * sin).to(x0.dtype)
        y1 = (x1 * cos + x0 * sin).to(x0.dtype)
        x = _pinned(tl.reshape(tl.permute(tl.join(y0, y1), (0, 2, 1)), (ROWS, D_PADDED)))
    return x


@triton.jit
def _pinned(x):
    """Return x, computed once: without this the compiler for mma instructions, whose operands lie in registers, lets every warp
    turn all keys, eight times too many."""
    if not _INTERPRETED:  # it knows no assembly
        PACK: tl.constexpr = 32 // x.dtype.primitive_bitwidth
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=PACK)
    return x


@triton.jit
def store_turned_back(ptr, stride, rotary_ptr, start, end, x, D: tl.constexpr):
    """Write x (ROWS, D_PADDED), a gradient of what `load_turned` gave, as the gradient of what it read."""
    if rotary_ptr is None:
        store_rows(ptr, stride, start, end, x, D)
    else:
        ROWS: tl.constexpr = x.shape[0]
        HALF: tl.constexpr = x.shape[1] // 2
        x0, x1 = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, HALF)), (0, 2, 1)))
        cos, sin = _angles(rotary_ptr, start, end, ROWS, D, 2 * HALF)
        store_rows(ptr, stride, start, end, x0 * cos + x1 * sin, D // 2)
        store_rows(ptr + D // 2, stride, start, end, x1 * cos - x0 * sin, D // 2)


@triton.jit
def _angles(rotary_ptr, start, end, ROWS: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr):
    """Return cosines and sines, each (ROWS, D_PADDED / 2)."""
    cos = load_rows(rotary_ptr, D, start, end, ROWS, D // 2, D_PADDED // 2)
    sin = load_rows(rotary_ptr + D // 2, D, start, end, ROWS, D // 2, D_PADDED // 2)
    return cos, sin
