"""The feed-forward half of a layer, GELU(x @ w1.T + b1) @ w2.T, as one op that may drop GELU's output.

The second bias is not added here: `residual_norm` and `residual_add` add it for free.
Backward: da = dy @ w2;  df = da * GELU'(f);  db1 = sum_T df;  dw2 = dy.T @ a;  dw1 = df.T @ x;  dx = df @ w1.
Of t processes each holds F/t rows of w1 and columns of w2; y and dx are sums over them, as in kernels/parallel/collectives.py.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...parallel.collectives import (
    ONE_PROCESS,
    Pending,
    TensorParallel,
    start_all_gather,
    start_all_reduce_,
    start_reduce_scatter,
)
from ..choices import Activation, Kernels, uses_triton
from ..linear import product, start_input_gradient, weight_gradient
from ..operator import operator, reshaped

_APPROXIMATION = {"gelu": "none", "gelu_tanh": "tanh"}
_TANH_LINEAR = 2 * math.sqrt(2 / math.pi)
_TANH_CUBIC = 0.044715 * _TANH_LINEAR


def gelu(x: Tensor, activation: Activation) -> Tensor:
    """Return GELU(x): x * Phi(x) for `gelu`, its tanh approximation for `gelu_tanh`. Source: arXiv 1606.08415."""
    return F.gelu(x, approximate=_APPROXIMATION[activation])


def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    activation: Activation,
    *,
    gelu_checkpoint: bool,
    kernels: Kernels = "auto",
    parallel: TensorParallel = ONE_PROCESS,
) -> Tensor:
    """Return GELU(x @ w1.T + b1) @ w2.T, in the shape and dtype of x.

    x: (..., H); w1: (F, H); b1: (F,); w2: (H, F); one float dtype. GELU is computed in fp32 or wider on a GPU.
    parallel: the t processes of which each holds F/t of F. x and the result are replicated, or with `sequence` this
        process's part along dim 0.
    Kept for backward: x, GELU's input (..., F/t) and, unless gelu_checkpoint, its output (..., F/t).
    Raises ValueError for shapes that do not fit, and for float64 on a GPU.
    """
    check_sizes(x, w1, b1, w2)
    return _Mlp.apply(x, w1, b1, w2, MlpOptions(activation, gelu_checkpoint, kernels, parallel), False)  # type: ignore[no-any-return, no-untyped-call]


@dataclass(frozen=True)
class MlpOptions:
    """Arguments of `mlp` beside tensors."""

    activation: Activation
    gelu_checkpoint: bool
    kernels: Kernels
    parallel: TensorParallel


def mlp_and_input(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, options: MlpOptions) -> tuple[Tensor, Tensor]:
    """Return `mlp`, and x again for the residual stream around it; see `linear_and_input`."""
    check_sizes(x, w1, b1, w2)
    return _Mlp.apply(x, w1, b1, w2, options, True)  # type: ignore[no-any-return, no-untyped-call]


def check_sizes(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> None:
    """Raise ValueError where the arguments of `mlp` do not fit."""
    width, size = w1.shape
    if x.shape[-1] != size or w2.shape[1] != width or b1.shape != (width,):
        raise ValueError(
            f"x {tuple(x.shape)}, w1 {tuple(w1.shape)}, b1 {tuple(b1.shape)} and w2 {tuple(w2.shape)} do not fit; "
            f"they must be (..., H), (F, H), (F,) and (H, F)"
        )


def gelu_forward_reference(f: Tensor, activation: Activation) -> Tensor:
    """Return a = GELU(f), (T, F)."""
    if activation == "gelu_tanh" and f.device.type == "cpu" and not torch.compiler.is_exporting():
        return _tanh_gate(f).mul_(f).to(f.dtype)
    return gelu(f, activation)


def gelu_backward_reference(
    da: Tensor, f: Tensor, activation: Activation, recompute: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return df (T, F) in the place of da, db1 (F,), and GELU(f) if recompute; da, f: (T, F), contiguous."""
    if activation == "gelu_tanh" and f.device.type == "cpu":
        gate = _tanh_gate(f)
        inner = f.to(gate.dtype).square().mul_(3 * _TANH_CUBIC).add_(_TANH_LINEAR).mul_(f)
        slope = inner.mul_(1 - gate).add_(1).mul_(gate)  # gate + f gate' = gate (1 + (1 - gate) f (2 u)')
        df = da.copy_(slope.mul_(da))
        return df, df.sum(0), gate.mul_(f).to(f.dtype) if recompute else None
    df = torch.ops.aten.gelu_backward.grad_input(da, f, approximate=_APPROXIMATION[activation], grad_input=da)
    return df, df.sum(0), gelu(f, activation) if recompute else None


def _tanh_gate(f: Tensor) -> Tensor:
    """Return sigmoid(2 u) = (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (f + 0.044715 f**3), fp32 or wider.

    On a CPU torch's own tanh GELU takes three times as long as this.
    """
    wide = f.to(torch.promote_types(f.dtype, torch.float32))
    return (wide * wide).mul_(_TANH_CUBIC).add_(_TANH_LINEAR).mul_(wide).sigmoid_()


@operator("gelu_forward(Tensor f, str activation, str kernels) -> Tensor", lambda f, *_: torch.empty_like(f))
def _gelu_forward(f: Tensor, activation: Activation, kernels: Kernels) -> Tensor:
    """Return GELU(f), (T, F)."""
    if uses_triton(f, kernels):
        from .mlp_triton import gelu_forward

        return gelu_forward(f, activation)
    return gelu_forward_reference(f, activation)


@operator(
    "gelu_backward_(Tensor(a!) da, Tensor f, str activation, bool recompute, str kernels) -> (Tensor, Tensor)",
    lambda da, f, activation, recompute, kernels: (f.new_empty(f.shape[1]), f.new_empty(f.shape if recompute else 0)),
)
def _gelu_backward_(
    da: Tensor, f: Tensor, activation: Activation, recompute: bool, kernels: Kernels
) -> tuple[Tensor, Tensor]:
    """Return db1 (F,), and GELU(f) (T, F), empty without recompute; da (T, F) becomes df."""
    if uses_triton(f, kernels):
        from .mlp_triton import gelu_backward as backward
    else:
        backward = gelu_backward_reference
    _, db1, a = backward(da, f, activation, recompute)
    return db1, f.new_empty(0) if a is None else a


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, options: MlpOptions, with_input: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        rows = x.reshape(-1, x.shape[-1])
        f = product(_start_gather(rows, options).wait(), w1, b1)
        a = _gelu_forward(f, options.activation, options.kernels)
        ctx.save_for_backward(rows, f, None if options.gelu_checkpoint else a, w1, w2)
        ctx.options = options
        ctx.set_materialize_grads(not with_input)
        y = reshaped(_start_sum_(product(a, w2), options).wait(), *x.shape[:-1], w2.shape[0])
        return (y, x.view_as(x)) if with_input else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dinput: Tensor | None = None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return dinput, None, None, None, None, None
        rows, f, a, w1, w2 = ctx.saved_tensors
        options: MlpOptions = ctx.options
        dy_rows = _start_gather(dy.reshape(-1, dy.shape[-1]), options).wait()
        gathering = _start_gather(rows, options)
        df = product(dy_rows, w2.t())  # the gradient of GELU's output until the next line
        db1, recomputed = _gelu_backward_(df, f, options.activation, a is None, options.kernels)
        dw2 = weight_gradient(dy_rows, recomputed if a is None else a)
        del a, recomputed  # (T, F), gone before the last two products ask for memory
        around = (
            None if dinput is None else dinput.reshape(-1, dinput.shape[-1])
        )  # may be dy, which nothing reads any more
        parallel = options.parallel
        finish_dx = start_input_gradient(df, w1, parallel.group, parallel.sequence, around)
        dw1 = weight_gradient(df, gathering.wait())
        return finish_dx().view(*dy.shape[:-1], w1.shape[1]), dw1, db1, dw2, None, None


def _start_gather(rows: Tensor, options: MlpOptions) -> Pending:
    """Return the rows of all processes, where each has a part of them."""
    return start_all_gather(rows, options.parallel.group) if options.parallel.sequence else Pending(rows)


def _start_sum_(rows: Tensor, options: MlpOptions) -> Pending:
    """Return the sum over the processes, or where each has a part of the rows, its part of the sum."""
    start = start_reduce_scatter if options.parallel.sequence else start_all_reduce_
    return start(rows, options.parallel.group)
