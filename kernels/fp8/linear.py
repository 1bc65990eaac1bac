"""A linear layer whose three matrix products have FP8 operands.

Forward y = x @ weight.T + bias; backward dx = dy @ weight, dweight = dy.T @ x, dbias = sum_T dy, the last in high precision.
Activations and weights are E4M3, gradients dy are E5M2 (Format.HYBRID) or E4M3. Sums are fp32; results are rounded once.
"""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.amax import largest_magnitude
from ..ops.linear import linear, weight_gradient
from ..ops.main_grad import add_to_main_grad, into_main_grad
from ..ops.operator import reshaped
from ..ops.region import active_region
from .layout import Fp8Tensor
from .products import check_fp8_features, dgrad, fp8_path, fprop, quantize, wgrad
from .scaling import (
    DelayedScaling,
    Float8CurrentScaling,
    Format,
    Fp8State,
    Recipe,
    Use,
    backward_dtype,
    forward_dtype,
    fp8_autocast,
    is_fp8_enabled,
)

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
    "takes_amax",
]

_WIDE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Fp8State,
    *,
    is_first_microbatch: bool | None = None,
    main_grad: Tensor | None = None,
    amax: Tensor | None = None,
) -> Tensor:
    """Return x @ weight.T + bias, (..., N) in the dtype of x, with FP8 products where fp8_autocast says so.

    x: (..., K); weight: (N, K); bias: (N,) or None; each fp32, bf16 or fp16, not necessarily the same. Any number of tokens;
    K and N must be multiples of 16. Outside of FP8 regions it is kernels/ops/linear.py's linear in the dtype of x.
    state: the layer's own. is_first_microbatch: None casts the weight in every call; True casts and keeps it; False takes the
    kept one unless the weight changed since. main_grad: (N, K), gets the weight's gradient added, or with
    is_first_microbatch=True written, in place of weight.grad. amax: max |x|, (), fp32, where the op before knows it; see
    `takes_amax`.
    Kept for backward: x and weight in FP8, one byte per number, once each; x itself if the recipe's
    override_linear_precision leaves the weight's gradient in high precision.
    Under torch.compile only Float8CurrentScaling is traced; DelayedScaling breaks the graph.
    Raises ValueError for shapes and dtypes other than these.
    """
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has last dim {x.shape[-1]}, weight is {tuple(weight.shape)}; the last dims must be equal")
    run = _linear
    if breaks_graph():
        run = torch.compiler.disable(_linear)  # here and not at import, because it imports torch._dynamo and triton
    return run(x, weight, bias, state, is_first_microbatch, main_grad, amax)


def takes_amax(state: Fp8State, device: torch.device) -> bool:
    """Return whether a call that starts now makes use of the amax of its input: current scaling needs it before the cast."""
    call = LinearCall.begin(state, device)
    return call.enabled and isinstance(call.recipe, Float8CurrentScaling)


def breaks_graph() -> bool:
    """Return whether a trace must not see a call that starts now: scales of delayed scaling change outside of the graph."""
    region = active_region() if torch.compiler.is_compiling() else None
    return region is not None and region.enabled and isinstance(region.recipe, DelayedScaling)


@dataclass(frozen=True)
class LinearCall:
    """One call of a linear layer: where its scales come from, where its amaxes and its weight's gradient go.

    enabled: whether its products are in FP8. state, use: None in a trace, which has current scaling alone.
    """

    enabled: bool
    recipe: Recipe
    is_first_microbatch: bool | None
    main_grad: Tensor | None
    state: Fp8State | None
    use: Use | None

    @classmethod
    def begin(
        cls,
        state: Fp8State,
        device: torch.device,
        is_first_microbatch: bool | None = None,
        main_grad: Tensor | None = None,
    ) -> "LinearCall":
        """Return the call that starts now; arguments as in `fp8_linear`."""
        options = is_first_microbatch, main_grad
        tracing = torch.compiler.is_compiling()
        use = None if tracing else state.begin(device)
        region = active_region() if tracing else None if use is None else use.region
        if region is None:
            return cls(False, Float8CurrentScaling(), *options, None, None)
        return cls(region.enabled, region.recipe, *options, None if tracing else state, use)

    @property
    def calibrates(self) -> bool:
        """Return whether it computes in high precision and records amaxes."""
        return not self.enabled and self.use is not None and bool(self.use.slots)

    @property
    def wide_wgrad(self) -> bool:
        """Return whether the weight's gradient is computed in high precision."""
        return self.recipe.override_linear_precision[2]

    def scale(self, name: str) -> Tensor | None:
        """See `Use.scale`."""
        return None if self.use is None else self.use.scale(name)

    def record(self, name: str, amax: Tensor) -> None:
        """See `Use.record`."""
        if self.use is not None:
            self.use.record(name, amax)

    def quantize_input(self, x: Tensor, columns: bool, amax: Tensor | None) -> Fp8Tensor:
        """Return x (T, K) in FP8 for the forward product, with columns for the weight's gradient."""
        x_q, amax = quantize(x, self.scale("input"), forward_dtype(self.recipe), rows=True, columns=columns, amax=amax)
        self.record("input", amax)
        return x_q

    def quantize_gradient(self, dy: Tensor, *, rows: bool, columns: bool) -> Fp8Tensor:
        """Return dy (T, N) in FP8: rows for the input's gradient, columns for the weight's."""
        dtype = backward_dtype(self.recipe)
        dy_q, amax = quantize(dy, self.scale("grad_output"), dtype, rows=rows, columns=columns)
        self.record("grad_output", amax)
        return dy_q

    def quantize_weight(self, weight: Tensor, columns: bool) -> Fp8Tensor:
        """Return the weight in FP8, cast now or kept from before; rows always, columns at least if asked for."""
        first, use = self.is_first_microbatch, self.use
        cached, scale = self._cached(weight), self.scale("weight")
        recomputed = use is not None and use.region.step.closed
        if use is not None and recomputed and first is not None and use.kept_weight_scale is not None:
            scale = use.kept_weight_scale
        if cached is not None and (cached.scale is scale if recomputed else first is False):
            if use is not None:
                use.kept_weight_scale = cached.scale
            quantized = cached.quantized
            if columns and not quantized.columns.numel():  # kept by a pass without gradients
                cached.quantized = quantized = quantized._replace(columns=quantized.rows.t().contiguous())
            return quantized
        dtype = forward_dtype(self.recipe)
        quantized, amax = quantize(weight.detach(), scale, dtype, rows=True, columns=columns)
        self.record("weight", amax)
        if self.state is not None and first is not None and not recomputed:
            self.state.weight_cache = _CachedWeight(weakref.ref(weight), weight._version, scale, quantized)
        return quantized

    def _cached(self, weight: Tensor) -> "_CachedWeight | None":
        """Return the kept copy if it is of the weight as it is now, for a call that says of which micro-batch it is."""
        cached: _CachedWeight | None = None if self.state is None else self.state.weight_cache
        if cached is None or self.is_first_microbatch is None:
            return None
        return cached if cached.weight() is weight and cached.version == weight._version else None

    def weight_gradient(
        self,
        dy: Fp8Tensor,
        x: Fp8Tensor,
        wide: tuple[Tensor, Tensor] | None,
        dtype: torch.dtype,
        weight: Tensor | None,
    ) -> Tensor | None:
        """Return dweight (N, K) in a dtype, or what `add_to_main_grad` gives the weight.

        wide: dy (T, N) and x (T, K), for wide_wgrad. weight: as `owner` gave it in forward.
        """
        dtype = dtype if self.main_grad is None else self.main_grad.dtype
        dweight = wgrad(dy, x, dtype) if wide is None else weight_gradient(*wide).to(dtype)
        if self.main_grad is None or weight is None:
            return dweight
        return add_to_main_grad(weight, self.main_grad, dweight, overwrite=self.is_first_microbatch is True)

    def owner(self, weight: Tensor) -> Tensor | None:
        """Return the weight where it has a main_grad; of any other, backward keeps the FP8 copy alone."""
        return None if self.main_grad is None else weight

    def trained(self, weight: Tensor) -> Tensor:
        """Return the weight for a product in high precision, its gradient sent to main_grad where there is one."""
        if self.main_grad is None:
            return weight
        return into_main_grad(weight, self.main_grad, overwrite=self.is_first_microbatch is True)


@dataclass
class _CachedWeight:
    """The FP8 weight of a first micro-batch, of which weight it is, and the scale that it was cast with."""

    weight: "weakref.ref[Tensor]"
    version: int
    scale: Tensor | None
    quantized: Fp8Tensor


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Fp8State,
    is_first_microbatch: bool | None,
    main_grad: Tensor | None,
    amax: Tensor | None,
) -> Tensor:
    call = LinearCall.begin(state, x.device, is_first_microbatch, main_grad)
    if not call.enabled:
        if call.calibrates:
            call.record("input", largest_magnitude(x.detach()))
            call.record("weight", largest_magnitude(weight.detach()))
        return linear(x, call.trained(weight).to(x.dtype), None if bias is None else bias.to(x.dtype))
    check_operands(x, weight)
    with_grad = torch.is_grad_enabled()
    with torch.no_grad():
        rows = x.detach().reshape(-1, x.shape[-1])
        x_q = call.quantize_input(rows, with_grad and weight.requires_grad and not call.wide_wgrad, amax)
        weight_q = call.quantize_weight(weight, with_grad and x.requires_grad)
    result: Tensor = _Linear.apply(x, weight, bias, x_q, weight_q, call)  # type: ignore[no-untyped-call]
    return result


def check_operands(x: Tensor, weight: Tensor) -> None:
    """Raise ValueError where FP8 products do not take the sizes of the weight or a dtype."""
    check_fp8_features(weight.shape[1], weight.shape[0])
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.dtype not in _WIDE_DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}; FP8 products need float32, bfloat16 or float16")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, x_q: Fp8Tensor, weight_q: Fp8Tensor, call: LinearCall
    ) -> Tensor:
        wide_x = x if call.wide_wgrad else None
        ctx.save_for_backward(x_q.columns, x_q.scale_inv, weight_q.columns, weight_q.scale_inv, wide_x)
        ctx.call, ctx.x_dtype, ctx.weight_dtype, ctx.owner = call, x.dtype, weight.dtype, call.owner(weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return reshaped(fprop(x_q, weight_q, bias, x.dtype), *x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_columns, x_inv, weight_columns, weight_inv, wide_x = ctx.saved_tensors
        call: LinearCall = ctx.call
        needs_dx, needs_dweight, needs_dbias = ctx.needs_input_grad[:3]
        rows = dy.reshape(-1, dy.shape[-1])
        dy_q = call.quantize_gradient(rows, rows=needs_dx, columns=needs_dweight and wide_x is None)
        dx = dweight = None
        if needs_dx:
            weight_q = Fp8Tensor(weight_columns, weight_columns, weight_inv)
            dx = dgrad(dy_q, weight_q, ctx.x_dtype).view(*dy.shape[:-1], len(weight_columns))
        if needs_dweight:
            x_q = Fp8Tensor(x_columns, x_columns, x_inv)
            wide = None if wide_x is None else (rows, wide_x.reshape(-1, wide_x.shape[-1]))
            dweight = call.weight_gradient(dy_q, x_q, wide, ctx.weight_dtype, ctx.owner)
        dbias = rows.sum(0).to(ctx.bias_dtype) if needs_dbias else None
        return dx, dweight, dbias, None, None, None
