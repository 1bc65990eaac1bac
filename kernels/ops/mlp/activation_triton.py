"""GPU kernels of activation.py: an activation or gate, and its gradient together with that of the bias before it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..choices import Activation
from ..norm.residual_norm_triton import sum_partials

_BLOCK = 2048
_TILE_ROWS, _TILE_COLUMNS = 8, 256
_ROW_PARTS = 64  # programs per strip of columns, the same on every GPU


@triton.jit
def _reciprocal(y):
    """Return 1 / y for y >= 1. A division would first look whether y is huge or tiny."""
    root = tl.rsqrt(y)
    return root * root


@triton.jit
def _normal_cdf(x):
    """Return Phi(x), to 1e-7, and exp(-x**2 / 2), which cost half of one erf.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26, with x / sqrt(2) for their x.
    """
    power = tl.math.exp2(x * x * -0.7213475204444817)
    t = _reciprocal(1.0 + 0.2316418882663604 * tl.abs(x))
    tail = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))) * power
    return tl.where(x < 0, tail, 1.0 - tail), power


@triton.jit
def _tanh_gelu_gate(x):
    """Return sigmoid(2 u) = (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x**3)."""
    minus_2u_in_bits = x * (-2.302208198144325 - 0.10294323460695527 * x * x)  # -2 u log2(e)
    return _reciprocal(1.0 + tl.math.exp2(minus_2u_in_bits))


@triton.jit
def _sigmoid(x):
    return _reciprocal(1.0 + tl.math.exp2(x * -1.4426950408889634))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Return act(x)."""
    if ACTIVATION == "gelu_tanh":
        gate = _tanh_gelu_gate(x)
    elif ACTIVATION == "silu":
        gate = _sigmoid(x)
    elif ACTIVATION == "relu2":
        gate = tl.where(x < 0, 0.0, x)
    else:
        gate, _ = _normal_cdf(x)
    return x * gate


@triton.jit
def activate_and_slope(x, ACTIVATION: tl.constexpr):
    """Return act(x) and its derivative."""
    if ACTIVATION == "gelu_tanh":
        gate = _tanh_gelu_gate(x)
        slope = gate + x * gate * (1.0 - gate) * (1.5957691216057308 + 0.21406443847659614 * x * x)
    elif ACTIVATION == "silu":
        gate = _sigmoid(x)
        slope = gate + x * gate * (1.0 - gate)
    elif ACTIVATION == "relu2":
        gate = tl.where(x < 0, 0.0, x)
        slope = 2.0 * gate
    else:
        gate, power = _normal_cdf(x)
        slope = gate + x * 0.3989422804014327 * power
    return x * gate, slope


@triton.jit
def _activation_kernel(
    f_ptr,  # (elements,)
    a_ptr,  # (elements,) out
    elements,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(f_ptr + offsets, mask=offsets < elements, other=0.0).to(tl.float32)
    tl.store(a_ptr + offsets, activate(x, ACTIVATION).to(a_ptr.dtype.element_ty), mask=offsets < elements)


@triton.jit(do_not_specialize=["num_rows"])
def _gate_kernel(
    f_ptr,  # (T, 2 F): g and u
    a_ptr,  # (T, F) out: act(g) * u
    num_rows,
    F,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    valid = (rows < num_rows) & (columns < F)
    offsets = rows * (2 * F) + columns
    g = tl.load(f_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
    u = tl.load(f_ptr + offsets + F, mask=valid, other=0.0).to(tl.float32)
    tl.store(a_ptr + rows * F + columns, (activate(g, ACTIVATION) * u).to(a_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["num_rows", "tiles"])
def _activation_backward_kernel(
    da_ptr,  # (T, F); out: df
    f_ptr,  # (T, F)
    a_ptr,  # (T, F) out: act(f); unused without RECOMPUTE
    partial_ptr,  # (row parts, F) fp32 out: sums of df over the rows of each part; None: not asked for
    num_rows,
    tiles,  # tiles per program
    F,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RECOMPUTE: tl.constexpr,
):
    part = tl.program_id(1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = part * tiles
    for tile in range(first, first + tiles):
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        valid = (rows < num_rows)[:, None] & (columns < F)[None, :]
        offsets = rows[:, None] * F + columns[None, :]
        x = tl.load(f_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
        da = tl.load(da_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
        a, slope = activate_and_slope(x, ACTIVATION)
        df = da * slope
        tl.store(da_ptr + offsets, df.to(da_ptr.dtype.element_ty), mask=valid)
        if RECOMPUTE:
            tl.store(a_ptr + offsets, a.to(a_ptr.dtype.element_ty), mask=valid)
        if partial_ptr is not None:
            total += df
    if partial_ptr is not None:
        tl.store(partial_ptr + part.to(tl.int64) * F + columns, tl.sum(total, 0), mask=columns < F)


@triton.jit(do_not_specialize=["num_rows", "tiles"])
def _gate_backward_kernel(
    da_ptr,  # (T, F); with RECOMPUTE out: act(g) * u
    f_ptr,  # (T, 2 F): g and u
    df_ptr,  # (T, 2 F) out
    partial_ptr,  # (row parts, 2 F) fp32 out: sums of df over the rows of each part; None: not asked for
    num_rows,
    tiles,  # tiles per program
    F,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RECOMPUTE: tl.constexpr,
):
    part = tl.program_id(1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total_dg = tl.zeros((ROWS, COLUMNS), tl.float32)
    total_du = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = part * tiles
    for tile in range(first, first + tiles):
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        valid = (rows < num_rows)[:, None] & (columns < F)[None, :]
        offsets, half = rows[:, None] * (2 * F) + columns[None, :], rows[:, None] * F + columns[None, :]
        g = tl.load(f_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
        u = tl.load(f_ptr + offsets + F, mask=valid, other=0.0).to(tl.float32)
        da = tl.load(da_ptr + half, mask=valid, other=0.0).to(tl.float32)
        value, slope = activate_and_slope(g, ACTIVATION)
        dg = da * u * slope
        du = da * value
        tl.store(df_ptr + offsets, dg.to(df_ptr.dtype.element_ty), mask=valid)
        tl.store(df_ptr + offsets + F, du.to(df_ptr.dtype.element_ty), mask=valid)
        if RECOMPUTE:
            tl.store(da_ptr + half, (value * u).to(da_ptr.dtype.element_ty), mask=valid)
        if partial_ptr is not None:
            total_dg += dg
            total_du += du
    if partial_ptr is not None:
        partial_ptr += part.to(tl.int64) * (2 * F) + columns
        tl.store(partial_ptr, tl.sum(total_dg, 0), mask=columns < F)
        tl.store(partial_ptr + F, tl.sum(total_du, 0), mask=columns < F)


def activation_forward(f: Tensor, activation: Activation, gated: bool) -> Tensor:
    """Compute what `activation_forward_reference` does."""
    f = f.contiguous()
    if gated:
        num_rows, F = f.shape[0], f.shape[1] // 2
        a = f.new_empty(num_rows, F)
        grid = (triton.cdiv(num_rows, _TILE_ROWS), triton.cdiv(F, _TILE_COLUMNS))
        _gate_kernel[grid](f, a, num_rows, F, _TILE_ROWS, _TILE_COLUMNS, activation, num_warps=8)
        return a
    a = torch.empty_like(f)
    _activation_kernel[(triton.cdiv(f.numel(), _BLOCK),)](
        f, a, f.numel(), BLOCK=_BLOCK, ACTIVATION=activation, num_warps=8
    )
    return a


def activation_backward(
    da: Tensor, f: Tensor, activation: Activation, recompute: bool, with_bias: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute what `activation_backward_reference` does."""
    num_rows, F = f.shape
    a = torch.empty_like(f) if recompute else None
    grid, tiles, partial = _backward_grid(num_rows, F, f if with_bias else None)
    options = _TILE_ROWS, _TILE_COLUMNS, activation, recompute
    _activation_backward_kernel[grid](da, f, a, partial, num_rows, tiles, F, *options, num_warps=8)
    return da, None if partial is None else sum_partials(partial, [f])[0], a


def gate_backward(
    da: Tensor, f: Tensor, activation: Activation, recompute: bool, with_bias: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Compute what `gate_backward_reference` does."""
    num_rows, F = da.shape
    df = torch.empty_like(f)
    grid, tiles, partial = _backward_grid(num_rows, F, f if with_bias else None)
    options = _TILE_ROWS, _TILE_COLUMNS, activation, recompute
    _gate_backward_kernel[grid](da, f, df, partial, num_rows, tiles, F, *options, num_warps=8)
    return df, None if partial is None else sum_partials(partial, [f])[0]


def _backward_grid(num_rows: int, F: int, summed: Tensor | None) -> tuple[tuple[int, int], int, Tensor | None]:
    """Return the programs of a backward kernel over F columns, the tiles of each, and room for partial sums of `summed`."""
    tiles = max(1, triton.cdiv(triton.cdiv(num_rows, _TILE_ROWS), _ROW_PARTS))
    parts = triton.cdiv(num_rows, _TILE_ROWS * tiles)
    partial = None if summed is None else summed.new_empty((parts, 1, summed.shape[1]), dtype=torch.float32)
    return (triton.cdiv(F, _TILE_COLUMNS), parts), tiles, partial
