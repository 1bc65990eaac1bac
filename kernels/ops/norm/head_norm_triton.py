"""GPU kernels of head_norm.py: a row is a head of a token; programs and sums over them are as in residual_norm_triton.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .residual_norm_triton import BACKWARD_PROGRAMS, FORWARD_TILES, sum_partials, tile_of


@triton.jit
def _rows_of(tile, HEADS: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr):
    """Return a tile's rows (ROWS,) int64, which of them are queries and which values, and where their rstd is."""
    first = tile * ROWS
    place = first % HEADS + tl.arange(0, ROWS)  # in the heads of the first row's token and those behind it
    head = place % HEADS
    normed = (first // HEADS + place // HEADS) * (HEADS - KEYS) + head
    return (first + tl.arange(0, ROWS)).to(tl.int64), head < HEADS - 2 * KEYS, head >= HEADS - KEYS, normed


@triton.jit(do_not_specialize=["num_rows", "tiles"])
def _head_norm_kernel(
    qkv_ptr,  # (T * HEADS, H)
    q_weight_ptr,  # (H,)
    k_weight_ptr,  # (H,)
    out_ptr,  # (T * HEADS, H) out
    rstd_ptr,  # (T * (HEADS - KEYS),) fp32 out
    num_rows,
    tiles,  # tiles per program
    eps,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = tl.arange(0, COLUMNS)
    inside = columns < H
    q_weight = tl.load(q_weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    k_weight = tl.load(k_weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    first = tl.program_id(0) * tiles
    for tile in range(first, first + tiles):
        rows, queries, values, normed = _rows_of(tile, HEADS, KEYS, ROWS)
        valid = (rows < num_rows)[:, None] & inside[None, :]
        offsets = rows[:, None] * H + columns[None, :]
        x = tl.load(qkv_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x, 1) / H + eps)
        y = x * rstd[:, None] * tl.where(queries[:, None], q_weight, k_weight)
        y = tl.where(values[:, None], x, y)
        tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=valid)
        tl.store(rstd_ptr + normed, rstd, mask=(rows < num_rows) & (values == 0))


@triton.jit(do_not_specialize=["num_rows", "tiles"])
def _head_norm_backward_kernel(
    dout_ptr,  # (T * HEADS, H)
    qkv_ptr,  # (T * HEADS, H)
    rstd_ptr,  # (T * (HEADS - KEYS),) fp32
    q_weight_ptr,  # (H,)
    k_weight_ptr,  # (H,)
    dqkv_ptr,  # (T * HEADS, H) out
    partial_ptr,  # (programs, 2, H) fp32 out: the gradients of both weights
    num_rows,
    tiles,  # tiles per program
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = tl.arange(0, COLUMNS)
    inside = columns < H
    q_weight = tl.load(q_weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    k_weight = tl.load(k_weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    dq_weight = tl.zeros((ROWS, COLUMNS), tl.float32)
    dk_weight = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = tl.program_id(0) * tiles
    for tile in range(first, first + tiles):
        rows, queries, values, normed = _rows_of(tile, HEADS, KEYS, ROWS)
        valid = (rows < num_rows)[:, None] & inside[None, :]
        offsets = rows[:, None] * H + columns[None, :]
        dy = tl.load(dout_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
        x = tl.load(qkv_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
        # 0 for values, whose x_hat and gradients of weights are 0 then
        rstd = tl.load(rstd_ptr + normed, mask=(rows < num_rows) & (values == 0), other=0.0)[:, None]
        x_hat = x * rstd
        w = dy * tl.where(queries[:, None], q_weight, k_weight)
        dx = rstd * (w - x_hat * (tl.sum(w * x_hat, 1)[:, None] / H))
        dx = tl.where(values[:, None], dy, dx)
        tl.store(dqkv_ptr + offsets, dx.to(dqkv_ptr.dtype.element_ty), mask=valid)
        of_weight = dy * x_hat
        dq_weight += tl.where(queries[:, None], of_weight, 0.0)
        dk_weight += tl.where(queries[:, None], 0.0, of_weight)
    partial_ptr += tl.program_id(0).to(tl.int64) * 2 * H + columns
    tl.store(partial_ptr, tl.sum(dq_weight, 0), mask=inside)
    tl.store(partial_ptr + H, tl.sum(dk_weight, 0), mask=inside)


def head_norm_forward(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, key_heads: int
) -> tuple[Tensor, Tensor]:
    """Compute what `head_norm_forward_reference` does."""
    T, heads, D = qkv.shape
    tile = tile_of(D)
    qkv = qkv.contiguous()
    out, rstd = torch.empty_like(qkv), qkv.new_empty((T, heads - key_heads), dtype=torch.float32)
    grid = (triton.cdiv(T * heads, tile["ROWS"] * FORWARD_TILES),)
    numbers = T * heads, FORWARD_TILES, eps, heads, key_heads
    _head_norm_kernel[grid](qkv, q_weight, k_weight, out, rstd, *numbers, **tile)
    return out, rstd


def head_norm_backward(
    dout: Tensor, qkv: Tensor, rstd: Tensor, q_weight: Tensor, k_weight: Tensor, key_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what `head_norm_backward_reference` does."""
    T, heads, D = qkv.shape
    tile = tile_of(D)
    dout, qkv = dout.contiguous(), qkv.contiguous()
    dqkv = torch.empty_like(qkv)
    tiles = max(1, triton.cdiv(triton.cdiv(T * heads, tile["ROWS"]), BACKWARD_PROGRAMS))
    programs = triton.cdiv(T * heads, tile["ROWS"] * tiles)
    partial = torch.empty(programs, 2, D, dtype=torch.float32, device=qkv.device)
    tensors = dout, qkv, rstd, q_weight, k_weight, dqkv, partial
    _head_norm_backward_kernel[(programs,)](*tensors, T * heads, tiles, heads, key_heads, **tile)
    dq_weight, dk_weight = sum_partials(partial, [q_weight, k_weight])
    return dqkv, dq_weight, dk_weight
