"""GPU kernels of residual_norm.py.

A program works through tiles of (ROWS, COLUMNS), COLUMNS >= H, so a row's statistics need one pass over memory. Columns are
summed over T in registers by a number of programs that does not depend on the GPU, and their partial sums are added in
order by a second kernel: every run gives the same bits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...errors import UserError
from ..dropout import drop_threshold, keep_scale
from ..dropout_triton import SEED, keep_rows
from .residual_norm_options import Gradients, Options, Saved

_LARGEST_H = 8192
_TILE_ELEMENTS = 2048  # 8 warps of 8 elements a thread: one 128-bit load of a 16-bit type
_FORWARD_TILES = 4  # tiles per program: the parameters' loads are shared by them
_BACKWARD_PROGRAMS = 264  # two per SM of an H100 or H200
_SUM_COLUMNS = 32
NUMBERS = ["num_rows", "tiles", "site", "threshold"]


@triton.jit
def _dropped_sum(
    x_ptr, residual, offsets, valid, bias, seed, site, rows, threshold, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """Return residual + dropout(x + bias) of a tile, fp32."""
    x = tl.load(x_ptr + offsets, mask=valid, other=0.0).to(tl.float32) + bias
    if DROPS:
        x = tl.where(keep_rows(seed, site, rows, ROWS, COLUMNS, threshold), x * scale, 0.0)
    return residual + x


@triton.jit
def load_vectors(
    bias_ptr, weight_ptr, norm_bias_ptr, H: tl.constexpr, COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr
):  # fmt: skip
    """Return the bias, zero without HAS_BIAS, and weight and bias of the norm, (1, COLUMNS) fp32."""
    columns = tl.arange(0, COLUMNS)
    inside = columns < H
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    norm_bias = tl.load(norm_bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    bias = tl.zeros((1, COLUMNS), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    return bias, weight, norm_bias


@triton.jit
def norm_tile(
    x_ptr, bias, residual_ptr, weight, norm_bias, z_ptr, y_ptr, mean_ptr, rstd_ptr, seed,
    tile, num_rows, eps, site, threshold, scale,
    H: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_X: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """Store z, y, mean and rstd of a tile. Return y as it is stored, and which of its elements are stored."""
    inside = tl.arange(0, COLUMNS) < H
    rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    valid = (rows < num_rows)[:, None] & inside[None, :]
    offsets = rows[:, None] * H + tl.arange(0, COLUMNS)[None, :]
    z = tl.load(residual_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
    if HAS_X:
        z = _dropped_sum(x_ptr, z, offsets, valid, bias, seed, site, rows, threshold, scale, ROWS, COLUMNS, DROPS)
        rounded = z.to(z_ptr.dtype.element_ty)
        tl.store(z_ptr + offsets, rounded, mask=valid)
        z = rounded.to(tl.float32)  # the statistics are those of what backward will read
    z = tl.where(inside[None, :], z, 0.0)
    mean = tl.sum(z, 1) / H
    centred = tl.where(inside[None, :], z - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / H + eps)
    y = (centred * rstd[:, None] * weight + norm_bias).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offsets, y, mask=valid)
    tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)
    return y, valid


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=SEED)
def _norm_forward_kernel(
    x_ptr,  # (T, H); unused without HAS_X
    bias_ptr,  # (H,); unused without HAS_BIAS
    residual_ptr,  # (T, H)
    weight_ptr,  # (H,)
    norm_bias_ptr,  # (H,)
    z_ptr,  # (T, H) out; unused without HAS_X
    y_ptr,  # (T, H) out
    mean_ptr,  # (T,) fp32 out
    rstd_ptr,  # (T,) fp32 out
    seed_ptr,  # () int64; unused without DROPS
    num_rows,
    tiles,  # tiles per program
    eps,
    site,
    threshold,
    scale,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_X: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPS: tl.constexpr,
):
    bias, weight, norm_bias = load_vectors(bias_ptr, weight_ptr, norm_bias_ptr, H, COLUMNS, HAS_BIAS)
    seed = tl.load(seed_ptr) if DROPS else 0
    first = tl.program_id(0) * tiles
    for tile in range(first, first + tiles):
        norm_tile(
            x_ptr, bias, residual_ptr, weight, norm_bias, z_ptr, y_ptr, mean_ptr, rstd_ptr, seed,
            tile, num_rows, eps, site, threshold, scale, H, ROWS, COLUMNS, HAS_X, DROPS,
        )  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=SEED)
def _norm_backward_kernel(
    dz_ptr,  # (T, H); unused without HAS_DZ
    dy_ptr,  # (T, H)
    kept_ptr,  # (T, H): z, or y if INVERTED
    mean_ptr,  # (T,) fp32; unused if INVERTED
    rstd_ptr,  # (T,) fp32
    weight_ptr,  # (H,)
    norm_bias_ptr,  # (H,)
    seed_ptr,  # () int64; unused without DROPS
    dx_ptr,  # (T, H) out; unused without DROPS
    dresidual_ptr,  # (T, H) out
    partial_ptr,  # (programs, 2 or 3 with HAS_BIAS, H) fp32 out: dweight, dnorm_bias, dbias
    num_rows,
    tiles,  # tiles per program
    site,
    threshold,
    scale,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_DZ: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPS: tl.constexpr,
    INVERTED: tl.constexpr,
):
    columns = tl.arange(0, COLUMNS)
    inside = columns < H
    weight = tl.load(weight_ptr + columns, mask=inside, other=1.0).to(tl.float32)[None, :]
    if INVERTED:
        norm_bias = tl.load(norm_bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        inverse = 1.0 / weight
    seed = tl.load(seed_ptr) if DROPS else 0
    dweight = tl.zeros((ROWS, COLUMNS), tl.float32)
    dnorm_bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    dbias = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = tl.program_id(0) * tiles
    for tile in range(first, first + tiles):
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        valid = (rows < num_rows)[:, None] & inside[None, :]
        offsets = rows[:, None] * H + columns[None, :]
        dy = tl.load(dy_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
        kept = tl.load(kept_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
        if INVERTED:
            x_hat = tl.where(valid, (kept - norm_bias) * inverse, 0.0)
        else:
            mean = tl.load(mean_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
            x_hat = tl.where(valid, (kept - mean) * rstd, 0.0)
        w = dy * weight
        dresidual = rstd * (w - tl.sum(w, 1)[:, None] / H - x_hat * (tl.sum(w * x_hat, 1)[:, None] / H))
        if HAS_DZ:
            dresidual += tl.load(dz_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
        tl.store(dresidual_ptr + offsets, dresidual.to(dresidual_ptr.dtype.element_ty), mask=valid)
        dweight += dy * x_hat
        dnorm_bias += dy
        dx = dresidual
        if DROPS:
            dx = tl.where(keep_rows(seed, site, rows, ROWS, COLUMNS, threshold), dresidual * scale, 0.0)
            tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=valid)
        if HAS_BIAS:
            dbias += tl.where(valid, dx, 0.0)  # columns beyond H hold rstd * mean(w), rows beyond T hold 0
    sums: tl.constexpr = 3 if HAS_BIAS else 2
    partial_ptr += tl.program_id(0).to(tl.int64) * sums * H + columns
    tl.store(partial_ptr, tl.sum(dweight, 0), mask=inside)
    tl.store(partial_ptr + H, tl.sum(dnorm_bias, 0), mask=inside)
    if HAS_BIAS:
        tl.store(partial_ptr + 2 * H, tl.sum(dbias, 0), mask=inside)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=SEED)
def _add_forward_kernel(
    x_ptr,  # (T, H)
    bias_ptr,  # (H,); unused without HAS_BIAS
    residual_ptr,  # (T, H)
    z_ptr,  # (T, H) out
    seed_ptr,  # () int64; unused without DROPS
    num_rows,
    tiles,  # tiles per program
    site,
    threshold,
    scale,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPS: tl.constexpr,
):
    columns = tl.arange(0, COLUMNS)
    inside = columns < H
    bias = tl.zeros((1, COLUMNS), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    seed = tl.load(seed_ptr) if DROPS else 0
    first = tl.program_id(0) * tiles
    for tile in range(first, first + tiles):
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        valid = (rows < num_rows)[:, None] & inside[None, :]
        offsets = rows[:, None] * H + columns[None, :]
        residual = tl.load(residual_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
        z = _dropped_sum(
            x_ptr, residual, offsets, valid, bias, seed, site, rows, threshold, scale, ROWS, COLUMNS, DROPS
        )
        tl.store(z_ptr + offsets, z.to(z_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=SEED)
def _add_backward_kernel(
    dz_ptr,  # (T, H)
    seed_ptr,  # () int64; unused without DROPS
    dx_ptr,  # (T, H) out; unused without DROPS
    partial_ptr,  # (programs, H) fp32 out: dbias; unused without HAS_BIAS
    num_rows,
    tiles,  # tiles per program
    site,
    threshold,
    scale,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPS: tl.constexpr,
):
    columns = tl.arange(0, COLUMNS)
    inside = columns < H
    seed = tl.load(seed_ptr) if DROPS else 0
    dbias = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = tl.program_id(0) * tiles
    for tile in range(first, first + tiles):
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        valid = (rows < num_rows)[:, None] & inside[None, :]
        offsets = rows[:, None] * H + columns[None, :]
        dx = tl.load(dz_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
        if DROPS:
            dx = tl.where(keep_rows(seed, site, rows, ROWS, COLUMNS, threshold), dx * scale, 0.0)
            tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=valid)
        dbias += dx
    if HAS_BIAS:
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * H + columns, tl.sum(dbias, 0), mask=inside)


@triton.jit(do_not_specialize=["programs"])
def _sum_partials_kernel(
    partial_ptr,  # (programs, sums, width) fp32
    first_ptr,  # (width,) out, as the next two; those beyond the number of sums are unused
    second_ptr,
    third_ptr,
    programs,
    sums,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    which = tl.program_id(1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    partial_ptr += which * width + columns
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, programs, ROWS):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        valid = (rows < programs) & (columns < width)[None, :]
        total += tl.load(partial_ptr[None, :] + rows * (sums * width), mask=valid, other=0.0)
    result = tl.sum(total, 0)
    if which == 0:
        tl.store(first_ptr + columns, result.to(first_ptr.dtype.element_ty), mask=columns < width)
    elif which == 1:
        tl.store(second_ptr + columns, result.to(second_ptr.dtype.element_ty), mask=columns < width)
    else:
        tl.store(third_ptr + columns, result.to(third_ptr.dtype.element_ty), mask=columns < width)


def sum_partials(partial: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Return the sums over the first dim, each (width,), in an order that only the shape decides, with the dtypes of `like`.

    partial: (programs, len(like), width) fp32, contiguous; up to three sums. They do not share memory, as results of an
    operator must not.
    """
    programs, sums, width = partial.shape
    results = [torch.empty(width, dtype=tensor.dtype, device=partial.device) for tensor in like]
    grid = (triton.cdiv(width, _SUM_COLUMNS), sums)
    pointers = [*results, *results[:1] * (3 - sums)]
    _sum_partials_kernel[grid](partial, *pointers, programs, sums, width, ROWS=32, COLUMNS=_SUM_COLUMNS, num_warps=8)
    return results


def _tile(H: int) -> dict[str, int]:
    """Return the tile's shape and the warps for rows of H elements."""
    if H > _LARGEST_H:
        raise UserError(f"H={H} is over {_LARGEST_H}, the widest row of the GPU kernels; use kernels='reference'")
    columns = max(8, triton.next_power_of_2(H))
    rows = max(1, _TILE_ELEMENTS // columns)
    return {"H": H, "ROWS": rows, "COLUMNS": columns, "num_warps": max(8, min(32, columns // 256))}


def _backward_grid(num_rows: int, rows: int) -> tuple[int, int]:
    """Return the number of programs, and of tiles for each."""
    tiles = max(1, triton.cdiv(triton.cdiv(num_rows, rows), _BACKWARD_PROGRAMS))
    return triton.cdiv(num_rows, rows * tiles), tiles


def _dropout_arguments(options: Options) -> tuple[int, int, float]:
    return options.site, drop_threshold(options.p), keep_scale(options.p)


def residual_norm_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute what `residual_norm_forward_reference` does."""
    return launch_norm_forward(_norm_forward_kernel, *arguments)


def launch_norm_forward(
    kernel: Any,
    x: Tensor | None,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    seed: Tensor | None,
    options: Options,
    **more: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run a kernel with the parameters of `_norm_forward_kernel`, and more by name; see `residual_norm_forward_reference`."""
    num_rows, H = residual.shape
    tile = _tile(H)
    residual = residual.contiguous()
    z = residual if x is None else torch.empty_like(residual)
    y = torch.empty_like(residual)
    mean = torch.empty(num_rows, dtype=torch.float32, device=residual.device)
    rstd = torch.empty_like(mean)
    kernel[(triton.cdiv(num_rows, tile["ROWS"] * _FORWARD_TILES),)](
        residual if x is None else x.contiguous(),
        weight if bias is None else bias,
        residual,
        weight,
        norm_bias,
        z,
        y,
        mean,
        rstd,
        seed,
        num_rows,
        _FORWARD_TILES,
        options.eps,
        *_dropout_arguments(options),
        HAS_X=x is not None,
        HAS_BIAS=bias is not None,
        DROPS=seed is not None,
        **tile,
        **more,
    )
    return z, y, mean, rstd


def residual_norm_backward(dz: Tensor | None, dy: Tensor, saved: Saved, options: Options) -> Gradients:
    """Compute what `residual_norm_backward_reference` does."""
    kept, mean, rstd, weight, norm_bias, bias, seed = saved
    kept = kept.contiguous()  # the input of `norm` is kept as it was given
    num_rows, H = kept.shape
    tile = _tile(H)
    programs, tiles = _backward_grid(num_rows, tile["ROWS"])
    dresidual = torch.empty_like(kept)
    dx = dresidual if seed is None else torch.empty_like(kept)
    partial = torch.empty(programs, 2 if bias is None else 3, H, dtype=torch.float32, device=kept.device)
    _norm_backward_kernel[(programs,)](
        dy if dz is None else dz.contiguous(),
        dy.contiguous(),
        kept,
        rstd if mean is None else mean,
        rstd,
        weight,
        norm_bias,
        seed,
        dx,
        dresidual,
        partial,
        num_rows,
        tiles,
        *_dropout_arguments(options),
        HAS_DZ=dz is not None,
        HAS_BIAS=bias is not None,
        DROPS=seed is not None,
        INVERTED=options.inverted,
        **tile,
    )
    dweight, dnorm_bias, *rest = sum_partials(partial, [t for t in (weight, norm_bias, bias) if t is not None])
    return dx, rest[0] if rest else None, dresidual, dweight, dnorm_bias


def residual_add_forward(
    x: Tensor, bias: Tensor | None, residual: Tensor, seed: Tensor | None, options: Options
) -> Tensor:
    """Compute what `residual_add_forward_reference` does."""
    num_rows, H = residual.shape
    tile = _tile(H)
    residual = residual.contiguous()
    z = torch.empty_like(residual)
    _add_forward_kernel[(triton.cdiv(num_rows, tile["ROWS"] * _FORWARD_TILES),)](
        x.contiguous(),
        residual if bias is None else bias,
        residual,
        z,
        seed,
        num_rows,
        _FORWARD_TILES,
        *_dropout_arguments(options),
        HAS_BIAS=bias is not None,
        DROPS=seed is not None,
        **tile,
    )
    return z


def residual_add_backward(
    dz: Tensor, bias: Tensor | None, seed: Tensor | None, options: Options
) -> tuple[Tensor, Tensor | None]:
    """Compute what `residual_add_backward_reference` does."""
    if bias is None and seed is None:
        return dz, None
    num_rows, H = dz.shape
    tile = _tile(H)
    programs, tiles = _backward_grid(num_rows, tile["ROWS"])
    contiguous = dz.contiguous()
    dx = dz if seed is None else torch.empty_like(contiguous)
    partial = torch.empty(programs, 1, H, dtype=torch.float32, device=dz.device)
    _add_backward_kernel[(programs,)](
        contiguous,
        seed,
        dx,
        partial,
        num_rows,
        tiles,
        *_dropout_arguments(options),
        HAS_BIAS=bias is not None,
        DROPS=seed is not None,
        **tile,
    )
    return dx, None if bias is None else sum_partials(partial, [bias])[0]
