"""FP8 tensors: the cast of a tensor with its transpose and amax, and the three products of a linear layer.

Where the products run: on a GPU of compute capability 8.9 or more by torch._scaled_mm, elsewhere by fp32 products of the same
FP8 numbers, which round in the same places and are no faster than fp32. Triton casts for the former.
"""

from functools import cache

import torch
from torch import Tensor

from ..errors import UserError
from ..ops.amax import largest_magnitude
from ..ops.operator import operator
from .alignment import FP8_MULTIPLE
from .layout import Fp8Tensor, empty_cast, padded
from .scaling import divided


def quantize(
    x: Tensor, scale: Tensor | None, dtype: torch.dtype, *, rows: bool, columns: bool, amax: Tensor | None = None
) -> tuple[Fp8Tensor, Tensor]:
    """Return x (R, C) cast to an FP8 dtype, and its amax, (), fp32. scale: (), fp32, or None for the largest FP8 number / amax.

    amax: max |x|, (), fp32, where it is known; without a scale that saves a pass over x, beside one it is not read.
    Numbers beyond the FP8 range become its ends; NaN stays NaN.
    """
    known = amax if scale is None else None
    rows_q, columns_q, own_amax, scale_inv = _quantize(x, scale, known, dtype, rows, columns)
    return Fp8Tensor(rows_q, columns_q, scale_inv), own_amax if known is None else known


def fprop(x: Fp8Tensor, weight: Fp8Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """Return x @ weight.T + bias, (T, N); from the rows of both."""
    return _product(x.rows, weight.rows, x.scale_inv, weight.scale_inv, bias, out_dtype, True)


def dgrad(dy: Fp8Tensor, weight: Fp8Tensor, out_dtype: torch.dtype) -> Tensor:
    """Return dy @ weight, (T, K); from dy's rows and the weight's columns."""
    return _product(dy.rows, weight.columns, dy.scale_inv, weight.scale_inv, None, out_dtype, False)


def wgrad(dy: Fp8Tensor, x: Fp8Tensor, out_dtype: torch.dtype) -> Tensor:
    """Return dy.T @ x, (N, K); from the columns of both."""
    return _product(dy.columns, x.columns, dy.scale_inv, x.scale_inv, None, out_dtype, False)


def check_fp8_features(in_features: int, out_features: int) -> None:
    """Raise ValueError unless FP8 products take a weight of (out_features, in_features), the sizes on one device."""
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if size % FP8_MULTIPLE:
            raise UserError(
                f"{name} is {size}; FP8 products need multiples of {FP8_MULTIPLE} on each device, so pad it to "
                f"{padded(size)} or run this layer under fp8_autocast(enabled=False)"
            )


def fp8_path(device: torch.device) -> str:
    """Return a phrase for a start-up report: what computes FP8 products on this device."""
    if has_scaled_mm(device):
        return "FP8 products by torch._scaled_mm"
    return "FP8 emulated: same rounding, no speed"


@cache
def has_scaled_mm(device: torch.device) -> bool:
    """Return whether the device multiplies FP8 numbers; if so Triton casts there."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def quantize_reference(
    x: Tensor, scale: Tensor | None, amax: Tensor | None, dtype: torch.dtype, rows: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return rows (R, C), columns (C, R'), amax () and 1 / scale (); a layout that is not asked for is empty.

    amax: max |x|, if it is known and there is no scale; then the one that is returned is no number.
    """
    largest = torch.finfo(dtype).max
    own_amax = x.new_empty((), dtype=torch.float32) if amax is not None else largest_magnitude(x)
    if scale is None:
        amax = own_amax if amax is None else amax
        usable = (amax > 0) & amax.isfinite()  # of a tensor of zeros, or with an infinity or NaN, the scale is 1
        scale = torch.where(usable, divided(largest, amax), 1).clamp(max=torch.finfo(torch.float32).max)
    # Past the largest number a cast gives NaN or infinity, by torch's version and the type: never leave it to the cast.
    q = (x.float() * scale).clamp_(-largest, largest).to(dtype).contiguous()
    q_columns = x.new_zeros(x.shape[1], padded(len(x)), dtype=dtype) if columns else x.new_empty(0, dtype=dtype)
    if columns:
        q_columns[:, : len(x)] = q.t()
    return q if rows else x.new_empty(0, dtype=dtype), q_columns, own_amax, scale.reciprocal()


@operator(
    "fp8_quantize(Tensor x, Tensor? scale, Tensor? amax, ScalarType dtype, bool rows, bool columns) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    lambda x, scale, amax, dtype, rows, columns: empty_cast(x, dtype, rows, columns),
)
def _quantize(
    x: Tensor, scale: Tensor | None, amax: Tensor | None, dtype: torch.dtype, rows: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cast = quantize_reference
    if has_scaled_mm(x.device):
        from .cast_triton import quantize as cast
    return cast(x, scale, amax, dtype, rows, columns)


@operator(
    "fp8_product(Tensor a, Tensor b, Tensor a_inv, Tensor b_inv, Tensor? bias, ScalarType out_dtype, bool fast) -> Tensor",
    lambda a, b, a_inv, b_inv, bias, out_dtype, fast: a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype),
)
def _product(
    a: Tensor, b: Tensor, a_inv: Tensor, b_inv: Tensor, bias: Tensor | None, out_dtype: torch.dtype, fast: bool
) -> Tensor:
    """Return a_inv b_inv (a @ b.T) + bias, (M, N); a: (M, K), b: (N, K), FP8; N and K multiples of 16.

    fast: tensor cores may add in fewer bits than fp32's.
    """
    if not a.numel():
        return a.new_zeros(a.shape[0], b.shape[0], dtype=out_dtype)  # torch._scaled_mm takes no empty operands
    bias = None if bias is None else bias.to(out_dtype)
    if not has_scaled_mm(a.device):
        return product_reference(a, b, a_inv, b_inv, bias, out_dtype)
    fused = out_dtype != torch.float32  # its fp32 results take no bias
    y = torch._scaled_mm(
        a,
        b.t(),  # column-major, the only layout that Hopper's instructions read
        a_inv,
        b_inv,
        bias=bias if fused else None,
        out_dtype=out_dtype,
        use_fast_accum=fast,
    )
    return y if bias is None or fused else y.add_(bias)


def product_reference(
    a: Tensor, b: Tensor, a_inv: Tensor, b_inv: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Return what _product gives, from fp32 products of the same FP8 numbers."""
    with torch.autocast("cpu" if a.is_meta else a.device.type, enabled=False):  # torch has none of the meta device
        y = a.float().mm(b.float().t()).mul_(a_inv).mul_(b_inv)
    return (y if bias is None else y.add_(bias)).to(out_dtype)
