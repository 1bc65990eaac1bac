"""The feed-forward half of a layer, act(x @ w1.T + b1) @ w2.T, with FP8 products and the casts between them inside of GELU.

  forward   x -> FP8;  f = x @ w1.T + b1;  GELU(f) -> FP8;  y = GELU(f) @ w2.T
  backward  dy -> FP8;  da = dy @ w2;  df = da * GELU'(f) -> FP8;  db1 = sum_T df;  dw2, dw1, dx
f and da have the dtype of x. GELU(f) and df are rounded to it before they are cast, as if they had been in memory. On a GPU
they never are, with one exception: under current scaling df takes the place of da until its amax is known.
Another activation, or a gate, is an op of its own between two products.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.choices import Activation
from ..ops.mlp.activation import activated, activation_backward_reference, activation_forward_reference
from ..ops.mlp.mlp import check_sizes, mlp
from ..ops.operator import operator, reshaped
from .layout import Fp8Tensor, empty_cast
from .linear import Fp8State, LinearCall, breaks_graph, check_operands, fp8_linear
from .products import dgrad, fprop, has_scaled_mm, quantize_reference
from .scaling import backward_dtype, forward_dtype

MainGrads = tuple[Tensor | None, Tensor | None]


def fp8_mlp(  # noqa: PLR0913 - the arguments of two linear layers
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    activation: Activation,
    state1: Fp8State,
    state2: Fp8State,
    *,
    gated: bool = False,
    is_first_microbatch: bool | None = None,
    main_grads: MainGrads = (None, None),
    amax: Tensor | None = None,
) -> Tensor:
    """Return act(x @ w1.T + b1) @ w2.T, (..., H) in the dtype of x, with FP8 products where fp8_autocast says so.

    On a CPU bit for bit what fp8_linear, the activation and fp8_linear give one after the other. Over several processes it is
    one's part: x is replicated, w1 and w2 are shards along F, and the result is a part of a sum over the processes.
    x: (..., H); w1: (F, H), gated (2F, H); b1: as many or None; w2: (H, F). state1, state2: of the two products. Dtypes, sizes,
    amax, of x, is_first_microbatch, main_grads, of w1 and w2, and torch.compile: as in `fp8_linear`. Outside of FP8 regions it
    is kernels/ops/mlp/mlp.py's mlp in the dtype of x.
    Kept for backward: x, act(f) and both weights in FP8, one byte per number, and f in the dtype of x. Where the recipe's
    override_linear_precision leaves the gradients of weights in high precision, act(f) is needed so.
    Raises ValueError for shapes and dtypes other than these.
    """
    check_sizes(x, w1, b1, w2, gated)
    run = _mlp
    if breaks_graph():
        run = torch.compiler.disable(_mlp)  # here and not at import, because it imports torch._dynamo and triton
    first, (main1, main2) = is_first_microbatch, main_grads
    layers = _Layer(state1, first, main1), _Layer(state2, first, main2)
    return run(x, w1, b1, w2, (activation, gated), *layers, amax)


class _Layer(NamedTuple):
    """What `fp8_linear` takes beside tensors, of one of the two products."""

    state: Fp8State
    is_first_microbatch: bool | None
    main_grad: Tensor | None

    def begin(self, device: torch.device) -> LinearCall:
        return LinearCall.begin(self.state, device, self.is_first_microbatch, self.main_grad)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, amax: Tensor | None = None) -> Tensor:
        first, main_grad = self.is_first_microbatch, self.main_grad
        return fp8_linear(x, weight, bias, self.state, is_first_microbatch=first, main_grad=main_grad, amax=amax)


def _mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    part: tuple[Activation, bool],
    layer1: _Layer,
    layer2: _Layer,
    amax: Tensor | None,
) -> Tensor:
    activation, gated = part
    call1, call2 = layer1.begin(x.device), layer2.begin(x.device)
    casts_inside = not gated and activation in ("gelu", "gelu_tanh") and not call1.wide_wgrad
    if call1.calibrates or (call1.enabled and not casts_inside):
        return layer2.linear(activated(layer1.linear(x, w1, b1, amax), activation, gated=gated), w2, None)
    if not call1.enabled:
        wide1, wide2 = call1.trained(w1).to(x.dtype), call2.trained(w2).to(x.dtype)
        wide_bias = None if b1 is None else b1.to(x.dtype)
        return mlp(x, wide1, wide_bias, wide2, activation, gated=gated, gelu_checkpoint=False)
    check_operands(x, w1)
    check_operands(x, w2)
    given = [tensor is not None and tensor.requires_grad for tensor in (x, w1, b1, w2)]
    trains = [torch.is_grad_enabled() and requires for requires in given]
    with torch.no_grad():
        x_q = call1.quantize_input(x.detach().reshape(-1, x.shape[-1]), trains[1], amax)
        w1_q = call1.quantize_weight(w1, trains[0])
        f = fprop(x_q, w1_q, None if b1 is None else b1.detach(), x.dtype)
        scale, dtype = call2.scale("input"), forward_dtype(call2.recipe)
        rows, columns, a_amax, a_inv = _gelu_quantize(f, scale, activation, dtype, trains[3])
        call2.record("input", a_amax)
        w2_q = call2.quantize_weight(w2, any(trains[:3]))
    operands = _Operands(x_q, w1_q, f, Fp8Tensor(rows, columns, a_inv), w2_q)
    return _Fp8Mlp.apply(x, w1, b1, w2, operands, (call1, call2), activation)  # type: ignore[no-any-return, no-untyped-call]


class _Operands(NamedTuple):
    """What the forward products read, and GELU's input f (T, F)."""

    x: Fp8Tensor
    w1: Fp8Tensor
    f: Tensor
    a: Fp8Tensor
    w2: Fp8Tensor


class _Fp8Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, *rest: Any) -> Tensor:
        operands: _Operands
        operands, *others = rest
        columns = [part for q in operands if isinstance(q, Fp8Tensor) for part in (q.columns, q.scale_inv)]
        ctx.save_for_backward(operands.f, *columns)
        ctx.calls, ctx.activation = others
        ctx.owners = [call.owner(weight) for call, weight in zip(ctx.calls, (w1, w2), strict=True)]
        ctx.dtypes = x.dtype, w1.dtype, w1.dtype if b1 is None else b1.dtype, w2.dtype
        return reshaped(fprop(operands.a, operands.w2, None, x.dtype), *x.shape[:-1], w2.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        f, *saved = ctx.saved_tensors
        x_q, w1_q, a_q, w2_q = (Fp8Tensor(c, c, inv) for c, inv in zip(saved[::2], saved[1::2], strict=True))
        call1, call2 = ctx.calls
        needs_dx, needs_dw1, needs_db1, needs_dw2 = ctx.needs_input_grad[:4]
        x_dtype, w1_dtype, b1_dtype, w2_dtype = ctx.dtypes
        needs_df = needs_dx or needs_dw1 or needs_db1
        dy_q = call2.quantize_gradient(dy.reshape(-1, dy.shape[-1]), rows=needs_df, columns=needs_dw2)
        dw2 = call2.weight_gradient(dy_q, a_q, None, w2_dtype, ctx.owners[1]) if needs_dw2 else None
        if not needs_df:
            return (None, None, None, dw2) + (None,) * 3
        da = dgrad(dy_q, w2_q, x_dtype)
        scale, dtype = call1.scale("grad_output"), backward_dtype(call1.recipe)
        rows, columns, amax, inv, db1 = _gelu_backward_(da, f, scale, ctx.activation, dtype, needs_dx, needs_dw1)
        call1.record("grad_output", amax)
        del da, dy_q  # gone before the last two products ask for memory
        df_q = Fp8Tensor(rows, columns, inv)
        dx = dgrad(df_q, w1_q, x_dtype).view(*dy.shape[:-1], len(w1_q.columns)) if needs_dx else None
        dw1 = call1.weight_gradient(df_q, x_q, None, w1_dtype, ctx.owners[0]) if needs_dw1 else None
        return dx, dw1, db1.to(b1_dtype) if needs_db1 else None, dw2, None, None, None


def gelu_quantize_reference(
    f: Tensor, scale: Tensor | None, activation: Activation, dtype: torch.dtype, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return GELU(f) of f (T, F) in FP8: rows (T, F), columns (F, T'), amax () and 1 / scale (); as `quantize`."""
    return quantize_reference(activation_forward_reference(f, activation, False), scale, None, dtype, True, columns)


def gelu_backward_quantize_reference(
    da: Tensor, f: Tensor, scale: Tensor | None, activation: Activation, dtype: torch.dtype, rows: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return df = da * GELU'(f) in FP8, as `quantize`, and db1 (F,) in the dtype of f.

    da, f: (T, F), contiguous; da is overwritten.
    """
    df, db1, _ = activation_backward_reference(da, f, activation, False)
    assert db1 is not None, "it was asked for"
    return *quantize_reference(df, scale, None, dtype, rows, columns), db1


@operator(
    "fp8_gelu_quantize(Tensor f, Tensor? scale, str activation, ScalarType dtype, bool columns) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    lambda f, scale, activation, dtype, columns: empty_cast(f, dtype, True, columns),
)
def _gelu_quantize(
    f: Tensor, scale: Tensor | None, activation: Activation, dtype: torch.dtype, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if has_scaled_mm(f.device):
        from .mlp_triton import gelu_quantize as cast
    else:
        cast = gelu_quantize_reference
    return cast(f, scale, activation, dtype, columns)


@operator(
    "fp8_gelu_backward_(Tensor(a!) da, Tensor f, Tensor? scale, str activation, ScalarType dtype, bool rows, bool columns) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda da, f, scale, activation, dtype, rows, columns: (
        *empty_cast(f, dtype, rows, columns),
        f.new_empty(f.shape[1]),
    ),
)
def _gelu_backward_(
    da: Tensor, f: Tensor, scale: Tensor | None, activation: Activation, dtype: torch.dtype, rows: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if has_scaled_mm(f.device):
        from .mlp_triton import gelu_backward_quantize as backward
    else:
        backward = gelu_backward_quantize_reference
    return backward(da, f, scale, activation, dtype, rows, columns)
