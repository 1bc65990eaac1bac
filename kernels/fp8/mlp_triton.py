"""GPU kernels of mlp.py: GELU, and its gradient with that of the bias before it, cast to FP8 on their way to memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.amax_triton import magnitude_bits, raise_amax
from ..ops.choices import Activation
from ..ops.mlp.activation_triton import activate_and_slope
from ..ops.norm.residual_norm_triton import sum_partials
from .cast_triton import quantize, rounded_gelu, store_cast
from .layout import empty_cast, padded

_BLOCK = 4096
_AMAX_PROGRAMS = 1056  # each raises one amax in memory, which the device does one after the other
_BACKWARD_ROWS, _BACKWARD_COLUMNS = 64, 64  # half a cast's tile, for two operands
_ROW_PARTS = 64  # programs per strip of columns in backward, the same on every GPU


@triton.jit(do_not_specialize=["tiles"])
def _gelu_amax_kernel(
    f_ptr,  # (elements,)
    amax_ptr,  # () fp32 out, and zero before
    elements,
    tiles,  # tiles per program
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    largest = tl.zeros((BLOCK,), tl.int32)
    first = tl.program_id(0).to(tl.int64) * tiles
    for tile in range(first, first + tiles):
        offsets = tile * BLOCK + tl.arange(0, BLOCK)
        f = tl.load(f_ptr + offsets, mask=offsets < elements, other=0.0)
        largest = tl.maximum(largest, magnitude_bits(rounded_gelu(f, ACTIVATION)))
    raise_amax(amax_ptr, tl.max(largest))


@triton.jit(do_not_specialize=["num_rows", "tiles"])
def _gelu_backward_kernel(
    da_ptr,  # (T, F); without CAST out: df
    f_ptr,  # (T, F)
    scale_ptr,  # () fp32; unused without CAST
    amax_ptr,  # () fp32 out, and zero before
    rows_ptr,  # (T, F) FP8 out; unused without WITH_ROWS
    columns_ptr,  # (F, T') FP8 out; unused without WITH_COLUMNS
    scale_inv_ptr,  # () fp32 out; unused without CAST
    partial_ptr,  # (row parts, F) fp32 out: sums of df over the rows of each part
    num_rows,
    num_padded,  # T', a multiple of 16
    tiles,  # tiles per program
    F,
    LARGEST: tl.constexpr,
    CAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WITH_ROWS: tl.constexpr,
    WITH_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    part, column_tile = tl.program_id(1), tl.program_id(0)
    scale = tl.load(scale_ptr) if CAST else 1.0
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    largest = tl.zeros((COLUMNS,), tl.int32)
    first = part.to(tl.int64) * tiles
    for row_tile in range(first, first + tiles):
        row = row_tile * ROWS + tl.arange(0, ROWS)
        inside = (row < num_rows)[:, None] & (column < F)[None, :]
        offsets = row[:, None] * F + column[None, :]
        f = tl.load(f_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        da = tl.load(da_ptr + offsets, mask=inside, other=0.0)
        _, slope = activate_and_slope(f, ACTIVATION)
        wide = da.to(tl.float32) * slope
        total += tl.sum(wide, 0)
        rounded = wide.to(da.dtype)
        df = rounded.to(tl.float32)
        largest = tl.maximum(largest, tl.max(magnitude_bits(df), 0))
        if CAST:
            store_cast(
                df, scale, rows_ptr, columns_ptr, row_tile, column_tile, num_rows, num_padded, F,
                LARGEST, WITH_ROWS, WITH_COLUMNS, ROWS, COLUMNS,
            )  # fmt: skip
        else:
            tl.store(da_ptr + offsets, rounded, mask=inside)
    tl.store(partial_ptr + part.to(tl.int64) * F + column, total, mask=column < F)
    raise_amax(amax_ptr, tl.max(largest))
    if CAST and (part == 0) & (column_tile == 0):
        tl.store(scale_inv_ptr, tl.div_rn(1.0, scale))


def gelu_quantize(
    f: Tensor, scale: Tensor | None, activation: Activation, dtype: torch.dtype, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute what gelu_quantize_reference does; without a scale a first pass over f finds the amax of GELU(f)."""
    f = f.contiguous()
    amax = None
    if scale is None:
        amax = f.new_zeros((), dtype=torch.float32)
        tiles = max(1, triton.cdiv(triton.cdiv(f.numel(), _BLOCK), _AMAX_PROGRAMS))
        programs = max(1, triton.cdiv(f.numel(), _BLOCK * tiles))
        _gelu_amax_kernel[(programs,)](f, amax, f.numel(), tiles, BLOCK=_BLOCK, ACTIVATION=activation, num_warps=8)
    rows_q, columns_q, own_amax, scale_inv = quantize(f, scale, amax, dtype, True, columns, activation)
    return rows_q, columns_q, own_amax if amax is None else amax, scale_inv


def gelu_backward_quantize(
    da: Tensor, f: Tensor, scale: Tensor | None, activation: Activation, dtype: torch.dtype, rows: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute what gelu_backward_quantize_reference does; without a scale df goes to the place of da, and is cast from there.

    A pass that computes df twice would read and write as many bytes.
    """
    cast_rows, cast_columns = (rows, columns) if scale is not None else (False, False)
    rows_q, columns_q, amax, scale_inv = empty_cast(f, dtype, cast_rows, cast_columns)
    amax.zero_()
    T, F = f.shape
    tiles = max(1, triton.cdiv(triton.cdiv(T, _BACKWARD_ROWS), _ROW_PARTS))
    parts = max(1, triton.cdiv(T, _BACKWARD_ROWS * tiles))
    partial = torch.empty(parts, 1, F, device=f.device)
    tensors = da, f, scale, amax, rows_q, columns_q, scale_inv, partial
    options = torch.finfo(dtype).max, scale is not None, activation, cast_rows, cast_columns
    tile = _BACKWARD_ROWS, _BACKWARD_COLUMNS
    grid = (triton.cdiv(F, _BACKWARD_COLUMNS), parts)
    _gelu_backward_kernel[grid](*tensors, T, padded(T), tiles, F, *options, *tile, num_warps=8)
    if scale is None:
        rows_q, columns_q, _, scale_inv = quantize(da, None, amax, dtype, rows, columns)
    (db1,) = sum_partials(partial, [f])
    return rows_q, columns_q, amax, scale_inv, db1
