"""GPU kernels of fp8.py: a tensor cast to FP8, its transpose and its amax, from one read of the tensor."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS = 64, 128
_ALIGNMENT = 16


@triton.jit(do_not_specialize=["num_rows"])
def _quantize_kernel(
    x_ptr,  # (R, C)
    scale_ptr,  # () fp32; with CURRENT out
    amax_ptr,  # () fp32; without CURRENT out, and zero before
    rows_ptr,  # (R, C) FP8 out; unused without WITH_ROWS
    columns_ptr,  # (C, R') FP8 out; unused without WITH_COLUMNS
    scale_inv_ptr,  # () fp32 out
    num_rows,
    num_padded,  # R', a multiple of 16
    C,
    LARGEST: tl.constexpr,
    CURRENT: tl.constexpr,
    WITH_ROWS: tl.constexpr,
    WITH_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    if CURRENT:
        amax = tl.load(amax_ptr)
        usable = (amax > 0.0) & (amax < float("inf"))
        scale = tl.where(usable, tl.div_rn(LARGEST, tl.where(usable, amax, 1.0)), 1.0)
        scale = tl.minimum(scale, 3.4028234663852886e38)
    else:
        scale = tl.load(scale_ptr)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < num_rows) & (column < C)
    x = tl.load(x_ptr + row * C + column, mask=inside, other=0.0).to(tl.float32)
    if not CURRENT:
        # Magnitudes compare as their bits do, with NaN above infinity.
        bits = tl.abs(x).to(tl.int32, bitcast=True)
        tl.atomic_max(amax_ptr.to(tl.pointer_type(tl.int32)), tl.max(bits), sem="relaxed")
    scaled = tl.clamp(x * scale, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    q = scaled.to(rows_ptr.dtype.element_ty)
    if WITH_ROWS:
        tl.store(rows_ptr + row * C + column, q, mask=inside)
    if WITH_COLUMNS:
        turned = tl.trans(q)
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[None, :]
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[:, None]
        padded = (row < num_padded) & (column < C)
        tl.store(columns_ptr + column.to(tl.int64) * num_padded + row, turned, mask=padded)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(scale_inv_ptr, tl.div_rn(1.0, scale))


def quantize(
    x: Tensor, scale: Tensor | None, dtype: torch.dtype, rows: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As quantize_reference in fp8.py; without a scale, a pass of torch's reads the amax first."""
    x = x.contiguous()
    R, C = x.shape
    padded = triton.cdiv(R, _ALIGNMENT) * _ALIGNMENT
    rows_q = torch.empty(x.shape if rows else (0,), dtype=dtype, device=x.device)
    columns_q = torch.empty((C, padded) if columns else (0,), dtype=dtype, device=x.device)
    scale_inv = torch.empty((), device=x.device)
    if scale is None and x.numel():
        amax = torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32)
    else:
        amax = torch.zeros((), device=x.device)
    grid = (max(1, triton.cdiv(padded, _ROWS)), triton.cdiv(C, _COLUMNS))
    _quantize_kernel[grid](
        x,
        amax if scale is None else scale,
        amax,
        rows_q,
        columns_q,
        scale_inv,
        R,
        padded,
        C,
        LARGEST=torch.finfo(dtype).max,
        CURRENT=scale is None,
        WITH_ROWS=rows,
        WITH_COLUMNS=columns,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
    )
    return rows_q, columns_q, amax, scale_inv
