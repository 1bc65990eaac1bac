"""GPU kernels of products.py: a tensor, or its GELU, cast to FP8, its transpose and its amax, from one read of the tensor."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.amax_triton import magnitude_bits, raise_amax
from ..ops.choices import Activation
from ..ops.mlp.activation_triton import activate
from .layout import empty_cast, padded

_TILE_ROWS, _TILE_COLUMNS = 64, 128  # of a cast with a transpose


@triton.jit
def current_scale(amax_ptr, LARGEST: tl.constexpr):
    """Return the largest FP8 number / amax, or 1 where that is zero, infinite or NaN."""
    amax = tl.load(amax_ptr)
    usable = (amax > 0.0) & (amax < float("inf"))
    scale = tl.where(usable, tl.div_rn(LARGEST, tl.where(usable, amax, 1.0)), 1.0)
    return tl.minimum(scale, 3.4028234663852886e38)


@triton.jit
def rounded_gelu(f, ACTIVATION: tl.constexpr):
    """Return GELU(f), fp32, rounded to the dtype of f."""
    return activate(f.to(tl.float32), ACTIVATION).to(f.dtype).to(tl.float32)


@triton.jit
def store_cast(
    x, scale, rows_ptr, columns_ptr, row_tile, column_tile, num_rows, num_padded, C,
    LARGEST: tl.constexpr, WITH_ROWS: tl.constexpr, WITH_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store a tile of x (R, C), fp32, in FP8 and transposed; row_tile: int64. Rows from num_rows to R' must be 0 in x."""
    scaled = tl.clamp(x * scale, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    q = scaled.to(rows_ptr.dtype.element_ty)
    if WITH_ROWS:
        row = row_tile * ROWS + tl.arange(0, ROWS)[:, None]
        column = column_tile * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        tl.store(rows_ptr + row * C + column, q, mask=(row < num_rows) & (column < C))
    if WITH_COLUMNS:
        row = row_tile * ROWS + tl.arange(0, ROWS)[None, :]
        column = column_tile * COLUMNS + tl.arange(0, COLUMNS)[:, None]
        padded = (row < num_padded) & (column < C)
        tl.store(columns_ptr + column.to(tl.int64) * num_padded + row, tl.trans(q), mask=padded)


@triton.jit(do_not_specialize=["num_rows"])
def _quantize_kernel(
    x_ptr,  # (R, C)
    scale_ptr,  # () fp32; unused with CURRENT
    amax_ptr,  # () fp32; without CURRENT out, and zero before
    rows_ptr,  # (R, C) FP8 out; unused without WITH_ROWS
    columns_ptr,  # (C, R') FP8 out; unused without WITH_COLUMNS
    scale_inv_ptr,  # () fp32 out
    num_rows,
    num_padded,  # R', a multiple of 16
    C,
    LARGEST: tl.constexpr,
    CURRENT: tl.constexpr,
    GELU: tl.constexpr,  # the activation whose values are cast in place of x; None: x itself
    WITH_ROWS: tl.constexpr,
    WITH_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    scale = current_scale(amax_ptr, LARGEST) if CURRENT else tl.load(scale_ptr)
    row_tile, column_tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = row_tile * ROWS + tl.arange(0, ROWS)[:, None]
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    x = tl.load(x_ptr + row * C + column, mask=(row < num_rows) & (column < C), other=0.0)
    x = x.to(tl.float32) if GELU is None else rounded_gelu(x, GELU)
    if not CURRENT:
        raise_amax(amax_ptr, tl.max(magnitude_bits(x)))
    store_cast(
        x, scale, rows_ptr, columns_ptr, row_tile, column_tile, num_rows, num_padded, C,
        LARGEST, WITH_ROWS, WITH_COLUMNS, ROWS, COLUMNS,
    )  # fmt: skip
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(scale_inv_ptr, tl.div_rn(1.0, scale))


def quantize(
    x: Tensor,
    scale: Tensor | None,
    amax: Tensor | None,
    dtype: torch.dtype,
    rows: bool,
    columns: bool,
    activation: Activation | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute what quantize_reference in products.py does; without scale and amax, a pass of torch's reads the amax first.

    activation: cast GELU(x) in place of x. It needs the amax of that, or a scale.
    """
    x = x.contiguous()
    rows_q, columns_q, own_amax, scale_inv = empty_cast(x, dtype, rows, columns)
    if scale is not None or not x.numel():
        own_amax.zero_()
    elif amax is None:
        torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32, out=own_amax)
    R, C = x.shape
    known = own_amax if amax is None else amax
    tensors = x, known if scale is None else scale, known, rows_q, columns_q, scale_inv
    options = torch.finfo(dtype).max, scale is None, activation, rows, columns, _TILE_ROWS, _TILE_COLUMNS
    grid = (max(1, triton.cdiv(padded(R), _TILE_ROWS)), triton.cdiv(C, _TILE_COLUMNS))
    _quantize_kernel[grid](*tensors, R, padded(R), C, *options, num_warps=4 if activation is None else 8)
    return rows_q, columns_q, own_amax, scale_inv
