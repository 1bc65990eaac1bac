"""GPU kernels of residual_norm.py.

A program works through tiles of (ROWS, COLUMNS), COLUMNS >= H, so a row's statistics need one pass over memory. Columns are
summed over T in registers by a number of programs that does not depend on the GPU, and their partial sums are added in
order by a second kernel: every run gives the same bits.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...errors import UserError
from ..amax_triton import magnitude_bits, raise_amax
from ..dropout import drop_threshold, keep_scale
from ..dropout_triton import SEED, keep_rows
from .residual_norm_options import Gradients, Options, Saved

_LARGEST_H = 8192
_TILE_ELEMENTS = 2048  # 8 warps of 8 elements a thread: one 128-bit load of a 16-bit type
FORWARD_TILES = 4  # tiles per program: the parameters' loads are shared by them
BACKWARD_PROGRAMS = 264  # two per SM of an H100 or H200
_SUM_ROWS, _SUM_COLUMNS = 256, 32  # nearly all rows of a column at once: loads of the next ones would wait for these
_NUMBERS = ["num_rows", "tiles", "site", "threshold"]


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=SEED)
def _forward_kernel(
    x_ptr,  # (T, H); None: z is residual
    bias_ptr,  # (H,); None: without a bias
    residual_ptr,  # (T, H)
    weight_ptr,  # (H,); None, as the next and the four results behind z: without a norm
    norm_bias_ptr,  # (H,); None: without a bias
    z_ptr,  # (T, H) out; None without x
    y_ptr,  # (T, H) out
    mean_ptr,  # (T,) fp32 out; None: RMSNorm
    rstd_ptr,  # (T,) fp32 out
    amax_ptr,  # () fp32 out, and zero before; None: not asked for
    seed_ptr,  # () int64; None: no dropout
    num_rows,
    tiles,  # tiles per program
    eps,
    site,
    threshold,
    scale,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = tl.arange(0, COLUMNS)
    inside = columns < H
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        if norm_bias_ptr is not None:
            norm_bias = tl.load(norm_bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    bias = tl.zeros((1, COLUMNS), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    seed = tl.load(seed_ptr) if seed_ptr is not None else 0
    largest = tl.zeros((ROWS, COLUMNS), tl.int32)
    first = tl.program_id(0) * tiles
    for tile in range(first, first + tiles):
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        valid = (rows < num_rows)[:, None] & inside[None, :]
        offsets = rows[:, None] * H + columns[None, :]
        z = tl.load(residual_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
        if x_ptr is not None:
            x = tl.load(x_ptr + offsets, mask=valid, other=0.0).to(tl.float32) + bias
            if seed_ptr is not None:
                x = tl.where(keep_rows(seed, site, rows, ROWS, COLUMNS, threshold), x * scale, 0.0)
            rounded = (z + x).to(z_ptr.dtype.element_ty)
            tl.store(z_ptr + offsets, rounded, mask=valid)
            z = rounded.to(tl.float32)  # the statistics are those of what backward will read
        if weight_ptr is not None:
            z = tl.where(inside[None, :], z, 0.0)
            centred = z
            if mean_ptr is not None:
                mean = tl.sum(z, 1) / H
                centred = tl.where(inside[None, :], z - mean[:, None], 0.0)
            rstd = tl.rsqrt(tl.sum(centred * centred, 1) / H + eps)
            y = centred * rstd[:, None] * weight
            if norm_bias_ptr is not None:
                y = y + norm_bias
            y = y.to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + offsets, y, mask=valid)
            if mean_ptr is not None:
                tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
            tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)
            if amax_ptr is not None:
                largest = tl.maximum(largest, magnitude_bits(tl.where(valid, y.to(tl.float32), 0.0)))
    if amax_ptr is not None:
        raise_amax(amax_ptr, tl.max(largest))


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=SEED)
def _backward_kernel(  # noqa: PLR0912 - parts are chosen at compile time
    dz_ptr,  # (T, H); None: zero
    dy_ptr,  # (T, H); None, as the next five and dresidual: without a norm
    kept_ptr,  # (T, H): z, or y if INVERTED
    mean_ptr,  # (T,) fp32; None: INVERTED or RMS
    rstd_ptr,  # (T,) fp32
    weight_ptr,  # (H,)
    norm_bias_ptr,  # (H,); None: without a bias
    seed_ptr,  # () int64; None: no dropout
    dx_ptr,  # (T, H) out; unused without dropout
    dresidual_ptr,  # (T, H) out
    partial_ptr,  # (programs, sums, H) fp32 out: dweight with a norm, dnorm_bias with its bias, dbias with HAS_BIAS
    num_rows,
    tiles,  # tiles per program
    site,
    threshold,
    scale,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INVERTED: tl.constexpr,
    RMS: tl.constexpr,
):
    NORM: tl.constexpr = dy_ptr is not None
    NORM_BIAS: tl.constexpr = norm_bias_ptr is not None
    columns = tl.arange(0, COLUMNS)
    inside = columns < H
    if NORM:
        weight = tl.load(weight_ptr + columns, mask=inside, other=1.0).to(tl.float32)[None, :]
        if INVERTED:
            if NORM_BIAS:
                norm_bias = tl.load(norm_bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
            inverse = 1.0 / weight
    seed = tl.load(seed_ptr) if seed_ptr is not None else 0
    dweight = tl.zeros((ROWS, COLUMNS), tl.float32)
    dnorm_bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    dbias = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = tl.program_id(0) * tiles
    for tile in range(first, first + tiles):
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        valid = (rows < num_rows)[:, None] & inside[None, :]
        offsets = rows[:, None] * H + columns[None, :]
        if NORM:
            dy = tl.load(dy_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
            kept = tl.load(kept_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
            rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
            if INVERTED:
                if NORM_BIAS:
                    kept = kept - norm_bias
                x_hat = tl.where(valid, kept * inverse, 0.0)
            elif RMS:
                x_hat = kept * rstd
            else:
                mean = tl.load(mean_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
                x_hat = tl.where(valid, (kept - mean) * rstd, 0.0)
            w = dy * weight
            if RMS:
                dx = rstd * (w - x_hat * (tl.sum(w * x_hat, 1)[:, None] / H))
            else:
                dx = rstd * (w - tl.sum(w, 1)[:, None] / H - x_hat * (tl.sum(w * x_hat, 1)[:, None] / H))
            if dz_ptr is not None:
                dx += tl.load(dz_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
            tl.store(dresidual_ptr + offsets, dx.to(dresidual_ptr.dtype.element_ty), mask=valid)
            dweight += dy * x_hat
            if NORM_BIAS:
                dnorm_bias += dy
        else:
            dx = tl.load(dz_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
        if seed_ptr is not None:
            dx = tl.where(keep_rows(seed, site, rows, ROWS, COLUMNS, threshold), dx * scale, 0.0)
            tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=valid)
        if HAS_BIAS:
            # behind a norm columns beyond H hold rstd * mean(w), rows beyond T hold 0
            dbias += tl.where(valid, dx, 0.0) if NORM else dx
    sums: tl.constexpr = (1 if NORM else 0) + (1 if NORM_BIAS else 0) + (1 if HAS_BIAS else 0)
    partial_ptr += tl.program_id(0).to(tl.int64) * sums * H + columns
    if NORM:
        tl.store(partial_ptr, tl.sum(dweight, 0), mask=inside)
    if NORM_BIAS:
        tl.store(partial_ptr + H, tl.sum(dnorm_bias, 0), mask=inside)
    if HAS_BIAS:
        tl.store(partial_ptr + (sums - 1) * H, tl.sum(dbias, 0), mask=inside)


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
    tile = {"ROWS": _SUM_ROWS, "COLUMNS": _SUM_COLUMNS}
    _sum_partials_kernel[grid](partial, *pointers, programs, sums, width, **tile, num_warps=8)
    return results


def tile_of(H: int) -> dict[str, int]:
    """Return the tile's shape and the warps for rows of H elements."""
    if H > _LARGEST_H:
        raise UserError(f"H={H} is over {_LARGEST_H}, the widest row of the GPU kernels; use kernels='reference'")
    columns = max(8, triton.next_power_of_2(H))
    rows = max(1, _TILE_ELEMENTS // columns)
    return {"H": H, "ROWS": rows, "COLUMNS": columns, "num_warps": max(8, min(32, columns // 256))}


def _dropout_arguments(options: Options) -> tuple[int, int, float]:
    return options.site, drop_threshold(options.p), keep_scale(options.p)


def residual_norm_forward(
    x: Tensor | None,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor | None,
    norm_bias: Tensor | None,
    seed: Tensor | None,
    options: Options,
    amax: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Compute what `residual_norm_forward_reference` does; amax must be zero before. Without weight z alone has values."""
    num_rows, H = residual.shape
    tile = tile_of(H)
    residual = residual.contiguous()
    z = residual if x is None else torch.empty_like(residual)
    y, rstd, mean = z, z, None
    if weight is not None:
        y = torch.empty_like(residual)
        rstd = torch.empty(num_rows, dtype=torch.float32, device=residual.device)
        mean = None if options.kind == "rms_norm" else torch.empty_like(rstd)
    given = None if x is None else x.contiguous(), bias, residual, weight, norm_bias
    results = None if x is None else z, *((None,) * 3 if weight is None else (y, mean, rstd)), amax
    numbers = num_rows, FORWARD_TILES, options.eps, *_dropout_arguments(options)
    _forward_kernel[(triton.cdiv(num_rows, tile["ROWS"] * FORWARD_TILES),)](*given, *results, seed, *numbers, **tile)
    return z, y, mean, rstd


def residual_add_forward(
    x: Tensor, bias: Tensor | None, residual: Tensor, seed: Tensor | None, options: Options
) -> Tensor:
    """Compute what `residual_add_forward_reference` does."""
    return residual_norm_forward(x, bias, residual, None, None, seed, options)[0]


def residual_norm_backward(dz: Tensor | None, dy: Tensor, saved: Saved, options: Options) -> Gradients:
    """Compute what `residual_norm_backward_reference` does."""
    kept, mean, rstd, weight, norm_bias, bias, seed = saved
    kept = kept.contiguous()  # the input of `norm` is kept as it was given
    dresidual = torch.empty_like(kept)
    dx = dresidual if seed is None else torch.empty_like(kept)
    dz = None if dz is None else dz.contiguous()
    tensors = dz, dy.contiguous(), kept, mean, rstd, weight, norm_bias, seed, dx, dresidual
    vectors = [weight] if norm_bias is None else [weight, norm_bias]
    dweight, *rest = _run_backward(kept, tensors, vectors, bias, options)
    dnorm_bias = None if norm_bias is None else rest[0]
    return dx, None if bias is None else rest[-1], dresidual, dweight, dnorm_bias


def residual_add_backward(
    dz: Tensor, bias: Tensor | None, seed: Tensor | None, options: Options
) -> tuple[Tensor, Tensor | None]:
    """Compute what `residual_add_backward_reference` does."""
    if bias is None and seed is None:
        return dz, None
    contiguous = dz.contiguous()
    dx = dz if seed is None else torch.empty_like(contiguous)
    sums = _run_backward(contiguous, (contiguous, *[None] * 6, seed, dx, None), [], bias, options)
    return dx, sums[0] if sums else None


def _run_backward(
    rows: Tensor, tensors: Sequence[Tensor | None], vectors: list[Tensor], bias: Tensor | None, options: Options
) -> list[Tensor]:
    """Return the gradients of the norm's vectors, if any, and of the bias. tensors: the kernel's, down to dresidual."""
    num_rows, H = rows.shape
    tile = tile_of(H)
    tiles = max(1, triton.cdiv(triton.cdiv(num_rows, tile["ROWS"]), BACKWARD_PROGRAMS))
    programs = triton.cdiv(num_rows, tile["ROWS"] * tiles)
    vectors = vectors if bias is None else [*vectors, bias]
    partial = torch.empty(programs, len(vectors), H, dtype=torch.float32, device=rows.device)
    numbers = num_rows, tiles, *_dropout_arguments(options)
    kind = {"HAS_BIAS": bias is not None, "INVERTED": options.inverted, "RMS": options.kind == "rms_norm"}
    # left to itself the compiler takes 64 registers for rows of 768, and spills
    limit = 80 if options.inverted and options.kind == "rms_norm" else None
    _backward_kernel[(programs,)](*tensors, partial, *numbers, **kind, **tile, maxnreg=limit)
    return sum_partials(partial, vectors) if vectors else []
