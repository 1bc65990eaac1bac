"""A linear layer whose three matrix products have FP8 operands.

Forward y = x @ weight.T + bias; backward dx = dy @ weight, dweight = dy.T @ x, dbias = sum_T dy, the last in high precision.
Activations and weights are E4M3, gradients dy are E5M2 (Format.HYBRID) or E4M3. Sums are fp32; results are rounded once.

Where the products run: on a GPU of compute capability 8.9 or more by torch._scaled_mm, elsewhere by fp32 products of the same
FP8 numbers, which round in the same places and are no faster than fp32. Triton casts for the former.
"""

import weakref
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .fp8_scaling import (
    DelayedScaling,
    Float8CurrentScaling,
    Format,
    Fp8State,
    Recipe,
    Use,
    active_region,
    backward_dtype,
    divided,
    forward_dtype,
    fp8_autocast,
    is_fp8_enabled,
)
from .linear import linear, weight_gradient
from .operator import operator

__all__ = [
    "DelayedScaling",
    "Float8CurrentScaling",
    "Format",
    "Fp8State",
    "check_fp8_features",
    "fp8_autocast",
    "fp8_linear",
    "fp8_path",
    "is_fp8_enabled",
]

_ALIGNMENT = 16  # elements: cuBLAS reads FP8 rows in pieces of 16 bytes
_WIDE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Fp8State,
    *,
    is_first_microbatch: bool | None = None,
    main_grad: Tensor | None = None,
) -> Tensor:
    """x @ weight.T + bias, (..., N) in the dtype of x, with FP8 products where fp8_autocast says so.

    x: (..., K); weight: (N, K); bias: (N,) or None; each fp32, bf16 or fp16, not necessarily the same. Any number of tokens;
    K and N must be multiples of 16. Outside of FP8 regions it is kernels/linear.py's linear in the dtype of x.
    state: the layer's own. is_first_microbatch: None casts the weight in every call; True casts and keeps it; False takes the
    kept one unless the weight changed since. main_grad: (N, K), gets the weight's gradient added, or with
    is_first_microbatch=True written, in place of weight.grad.
    Kept for backward: x and weight in FP8, one byte per number, once each; x itself if the recipe's
    override_linear_precision leaves the weight's gradient in high precision.
    Under torch.compile only Float8CurrentScaling is traced; DelayedScaling breaks the graph.
    Raises ValueError for shapes and dtypes other than these.
    """
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has last dim {x.shape[-1]}, weight is {tuple(weight.shape)}; the last dims must be equal")
    call = _Call(is_first_microbatch, main_grad)
    if torch.compiler.is_compiling():
        region = active_region()
        if region is None or not region.enabled:
            return _wide_linear(x, weight, bias, call)
        if isinstance(region.recipe, DelayedScaling):
            # its scales change outside of the graph; here and not at import, because `disable` imports torch._dynamo and triton
            return torch.compiler.disable(_eager_linear)(x, weight, bias, state, call)
        return _linear(x, weight, bias, region.recipe, call)
    return _eager_linear(x, weight, bias, state, call)


def check_fp8_features(in_features: int, out_features: int) -> None:
    """Raises ValueError unless FP8 products take a weight of (out_features, in_features), the sizes on one device."""
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if size % _ALIGNMENT:
            raise ValueError(
                f"{name} is {size}; FP8 products need multiples of {_ALIGNMENT} on each device, so pad it to "
                f"{_padded(size)} or run this layer under fp8_autocast(enabled=False)"
            )


def fp8_path(device: torch.device) -> str:
    """What computes FP8 products on this device, for a start-up report."""
    if _has_scaled_mm(device):
        return "FP8 products by torch._scaled_mm"
    return "FP8 emulated: same rounding, no speed"


class Fp8Tensor(NamedTuple):
    """An (R, C) tensor in FP8, in the layouts that were asked for; data / scale is what it stands for.

    rows: (R, C), empty if not asked for. columns: (C, R'), its transpose, with zeros up to the next multiple of 16 of R.
    scale_inv: (), fp32, 1 / scale.
    """

    rows: Tensor
    columns: Tensor
    scale_inv: Tensor


def quantize(
    x: Tensor, scale: Tensor | None, dtype: torch.dtype, *, rows: bool, columns: bool
) -> tuple[Fp8Tensor, Tensor]:
    """x (R, C) in an FP8 dtype, and its amax, (), fp32. scale: (), fp32, or None for the largest FP8 number / amax.

    Numbers beyond the FP8 range become its ends; NaN stays NaN.
    """
    rows_q, columns_q, amax, scale_inv = _quantize(x, scale, dtype, rows, columns)
    return Fp8Tensor(rows_q, columns_q, scale_inv), amax


def fprop(x: Fp8Tensor, weight: Fp8Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """x @ weight.T + bias, (T, N); from the rows of both."""
    return _product(x.rows, weight.rows, x.scale_inv, weight.scale_inv, bias, out_dtype, True)


def dgrad(dy: Fp8Tensor, weight: Fp8Tensor, out_dtype: torch.dtype) -> Tensor:
    """dy @ weight, (T, K); from dy's rows and the weight's columns."""
    return _product(dy.rows, weight.columns, dy.scale_inv, weight.scale_inv, None, out_dtype, False)


def wgrad(dy: Fp8Tensor, x: Fp8Tensor, out_dtype: torch.dtype) -> Tensor:
    """dy.T @ x, (N, K); from the columns of both."""
    return _product(dy.columns, x.columns, dy.scale_inv, x.scale_inv, None, out_dtype, False)


@dataclass(frozen=True)
class _Call:
    """What one call of a layer is, besides its tensors."""

    is_first_microbatch: bool | None
    main_grad: Tensor | None
    state: Fp8State | None = None
    use: Use | None = None

    def add_to_main_grad(self, gradient: Tensor) -> None:
        assert self.main_grad is not None
        if self.is_first_microbatch:
            self.main_grad.copy_(gradient)
        else:
            self.main_grad.add_(gradient)


def _eager_linear(x: Tensor, weight: Tensor, bias: Tensor | None, state: Fp8State, call: _Call) -> Tensor:
    use = state.begin(x.device)
    if use is not None and use.region.enabled:
        return _linear(x, weight, bias, use.recipe, replace(call, state=state, use=use))
    if use is not None and use.slots:  # calibrating
        for name, tensor in (("input", x), ("weight", weight)):
            use.record(name, _amax(tensor.detach()))
    return _wide_linear(x, weight, bias, call)


def _wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None, call: _Call) -> Tensor:
    if call.main_grad is not None:
        weight = _IntoMainGrad.apply(weight, call)  # type: ignore[no-untyped-call]
    return linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class _IntoMainGrad(torch.autograd.Function):
    """The weight itself, whose gradient goes to main_grad."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, call: _Call) -> Tensor:
        ctx.call = call
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        ctx.call.add_to_main_grad(gradient)
        return None, None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe, call: _Call) -> Tensor:
    check_fp8_features(weight.shape[1], weight.shape[0])
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.dtype not in _WIDE_DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}; FP8 products need float32, bfloat16 or float16")
    with_grad, wide_wgrad = torch.is_grad_enabled(), recipe.override_linear_precision[2]
    with torch.no_grad():
        rows = x.detach().reshape(-1, x.shape[-1])
        columns = with_grad and weight.requires_grad and not wide_wgrad
        scale = None if call.use is None else call.use.scale("input")
        x_q, amax = quantize(rows, scale, forward_dtype(recipe), rows=True, columns=columns)
        if call.use is not None:
            call.use.record("input", amax)
        weight_q = _weight(weight, recipe, call, columns=with_grad and x.requires_grad)
    result: Tensor = _Linear.apply(x, weight, bias, x_q, weight_q, recipe, call)  # type: ignore[no-untyped-call]
    return result


@dataclass
class _CachedWeight:
    """The FP8 weight of a first micro-batch, and of which weight it is."""

    weight: "weakref.ref[Tensor]"
    version: int
    quantized: Fp8Tensor


def _weight(weight: Tensor, recipe: Recipe, call: _Call, columns: bool) -> Fp8Tensor:
    """The weight in FP8; rows always, columns at least if asked for."""
    use, state, first = call.use, call.state, call.is_first_microbatch
    cached: _CachedWeight | None = None if state is None else state.weight_cache
    recomputed = use is not None and use.region.step.closed
    if (
        cached is not None
        and (first is False or (first and recomputed))
        and (cached.weight() is weight and cached.version == weight._version)
    ):
        quantized = cached.quantized
        if columns and not quantized.columns.numel():  # kept by a pass without gradients
            cached.quantized = quantized = quantized._replace(columns=quantized.rows.t().contiguous())
        return quantized
    scale = None if use is None else use.scale("weight")
    quantized, amax = quantize(weight.detach(), scale, forward_dtype(recipe), rows=True, columns=columns)
    if use is not None:
        use.record("weight", amax)
    if state is not None and first is not None:
        state.weight_cache = _CachedWeight(weakref.ref(weight), weight._version, quantized)
    return quantized


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        x_q: Fp8Tensor,
        weight_q: Fp8Tensor,
        recipe: Recipe,
        call: _Call,
    ) -> Tensor:
        wide_x = x if recipe.override_linear_precision[2] else None
        ctx.save_for_backward(x_q.columns, x_q.scale_inv, weight_q.columns, weight_q.scale_inv, wide_x)
        ctx.recipe, ctx.call, ctx.x_dtype, ctx.weight_dtype = recipe, call, x.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return fprop(x_q, weight_q, bias, x.dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_columns, x_inv, weight_columns, weight_inv, wide_x = ctx.saved_tensors
        call: _Call = ctx.call
        needs_dx, needs_dweight, needs_dbias = ctx.needs_input_grad[:3]
        rows = dy.reshape(-1, dy.shape[-1])
        scale = None if call.use is None else call.use.scale("grad_output")
        columns = needs_dweight and wide_x is None
        dy_q, amax = quantize(rows, scale, backward_dtype(ctx.recipe), rows=needs_dx, columns=columns)
        if call.use is not None:
            call.use.record("grad_output", amax)
        dx = dweight = None
        if needs_dx:
            weight_q = Fp8Tensor(weight_columns, weight_columns, weight_inv)
            dx = dgrad(dy_q, weight_q, ctx.x_dtype).view(*dy.shape[:-1], len(weight_columns))
        if needs_dweight:
            wide_dtype = ctx.weight_dtype if call.main_grad is None else call.main_grad.dtype
            if wide_x is None:
                dweight = wgrad(dy_q, Fp8Tensor(x_columns, x_columns, x_inv), wide_dtype)
            else:
                dweight = weight_gradient(rows, wide_x.reshape(-1, wide_x.shape[-1])).to(wide_dtype)
            if call.main_grad is not None:
                call.add_to_main_grad(dweight)
                dweight = None
        dbias = rows.sum(0).to(ctx.bias_dtype) if needs_dbias else None
        return dx, dweight, dbias, None, None, None, None


def _padded(size: int) -> int:
    return (size + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT


def _amax(x: Tensor) -> Tensor:
    """max |x|, (), fp32; 0 of no numbers."""
    return x.abs().amax().float() if x.numel() else torch.zeros((), device=x.device)


def quantize_reference(
    x: Tensor, scale: Tensor | None, dtype: torch.dtype, rows: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rows (R, C), columns (C, R'), amax () and 1 / scale (); a layout that is not asked for is empty."""
    largest = torch.finfo(dtype).max
    amax = _amax(x)
    if scale is None:
        usable = (amax > 0) & amax.isfinite()  # of a tensor of zeros, or with an infinity or NaN, the scale is 1
        scale = torch.where(usable, divided(largest, amax), 1).clamp(max=torch.finfo(torch.float32).max)
    # Past the largest number a cast gives NaN or infinity, by torch's version and the type: never leave it to the cast.
    q = (x.float() * scale).clamp_(-largest, largest).to(dtype).contiguous()
    q_columns = x.new_zeros(x.shape[1], _padded(len(x)), dtype=dtype) if columns else x.new_empty(0, dtype=dtype)
    if columns:
        q_columns[:, : len(x)] = q.t()
    return q if rows else x.new_empty(0, dtype=dtype), q_columns, amax, scale.reciprocal()


def _fake_quantize(
    x: Tensor, scale: Tensor | None, dtype: torch.dtype, rows: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if rows else (0,), dtype=dtype),
        x.new_empty((x.shape[1], _padded(x.shape[0])) if columns else (0,), dtype=dtype),
        x.new_empty((), dtype=torch.float32),
        x.new_empty((), dtype=torch.float32),
    )


@operator(
    "fp8_quantize(Tensor x, Tensor? scale, ScalarType dtype, bool rows, bool columns) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_quantize,
)
def _quantize(
    x: Tensor, scale: Tensor | None, dtype: torch.dtype, rows: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if _has_scaled_mm(x.device):
        from .fp8_triton import quantize as cast
    else:
        cast = quantize_reference
    return cast(x, scale, dtype, rows, columns)


@operator(
    "fp8_product(Tensor a, Tensor b, Tensor a_inv, Tensor b_inv, Tensor? bias, ScalarType out_dtype, bool fast) -> Tensor",
    lambda a, b, a_inv, b_inv, bias, out_dtype, fast: a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype),
)
def _product(
    a: Tensor, b: Tensor, a_inv: Tensor, b_inv: Tensor, bias: Tensor | None, out_dtype: torch.dtype, fast: bool
) -> Tensor:
    """a_inv b_inv (a @ b.T) + bias, (M, N); a: (M, K), b: (N, K), FP8; N and K multiples of 16.

    fast: tensor cores may add in fewer bits than fp32's.
    """
    if not a.numel():
        return a.new_zeros(a.shape[0], b.shape[0], dtype=out_dtype)  # torch._scaled_mm takes no empty operands
    bias = None if bias is None else bias.to(out_dtype)
    if not _has_scaled_mm(a.device):
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
    """What _product gives, from fp32 products of the same FP8 numbers."""
    with torch.autocast(a.device.type, enabled=False):
        y = a.float().mm(b.float().t()).mul_(a_inv).mul_(b_inv)
    return (y if bias is None else y.add_(bias)).to(out_dtype)


@cache
def _has_scaled_mm(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
