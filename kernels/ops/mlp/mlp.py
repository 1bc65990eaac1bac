"""The feed-forward half of a layer, act(x @ w1.T + b1) @ w2.T, as one op that may drop the activation's output.

The second bias is not added here: `residual_norm` and `residual_add` add it for free.
Gated, f = x @ w1.T + b1 has 2F columns, of which the first F pass the activation and multiply the others: see activation.py.
Backward: da = dy @ w2;  df = da * act'(f);  db1 = sum_T df;  dw2 = dy.T @ a;  dw1 = df.T @ x;  dx = df @ w1.
Of t processes each holds F/t rows of w1 and columns of w2; y and dx are sums over them, as in kernels/parallel/collectives.py.
"""

from dataclasses import dataclass
from typing import Any

import torch
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
from ..choices import Activation, Kernels
from ..linear import product, start_input_gradient, weight_gradient
from ..operator import reshaped
from .activation import activation_forward, activation_gradient


def mlp(  # noqa: PLR0913 - the tensors of two products
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    activation: Activation,
    *,
    gated: bool = False,
    gelu_checkpoint: bool,
    kernels: Kernels = "auto",
    parallel: TensorParallel = ONE_PROCESS,
) -> Tensor:
    """Return act(x @ w1.T + b1) @ w2.T, in the shape and dtype of x.

    x: (..., H); w1: (F, H); b1: (F,) or None; w2: (H, F); one float dtype. On a GPU the activation is computed
    in fp32 or wider.
    gated: w1 is (2F, H) and b1 (2F,); the first F rows pass the activation and multiply what the others give.
    parallel: the t processes of which each holds F/t of F. x and the result are replicated, or with `sequence` this
        process's part along dim 0.
    Kept for backward: x, the activation's input (..., F/t), gated (..., 2F/t), and, unless gelu_checkpoint, its output
    (..., F/t).
    Raises ValueError for shapes that do not fit, and for float64 on a GPU.
    """
    check_sizes(x, w1, b1, w2, gated)
    options = MlpOptions(activation, gated, gelu_checkpoint, kernels, parallel)
    return _Mlp.apply(x, w1, b1, w2, options, False)  # type: ignore[no-any-return, no-untyped-call]


@dataclass(frozen=True)
class MlpOptions:
    """Arguments of `mlp` beside tensors."""

    activation: Activation
    gated: bool
    gelu_checkpoint: bool
    kernels: Kernels
    parallel: TensorParallel


def mlp_and_input(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, options: MlpOptions) -> tuple[Tensor, Tensor]:
    """Return `mlp`, and x again for the residual stream around it; see `linear_and_input`."""
    check_sizes(x, w1, b1, w2, options.gated)
    return _Mlp.apply(x, w1, b1, w2, options, True)  # type: ignore[no-any-return, no-untyped-call]


def check_sizes(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, gated: bool = False) -> None:
    """Raise ValueError where the arguments of `mlp` do not fit."""
    rows, width = w1.shape[0], w2.shape[1]
    if x.shape[-1] != w1.shape[1] or rows != (2 if gated else 1) * width or (b1 is not None and b1.shape != (rows,)):
        bias = None if b1 is None else tuple(b1.shape)
        wide = "2F" if gated else "F"
        raise ValueError(
            f"x {tuple(x.shape)}, w1 {tuple(w1.shape)}, b1 {bias} and w2 {tuple(w2.shape)} do not fit; "
            f"they must be (..., H), ({wide}, H), ({wide},) or None, and (H, F)"
        )


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, options: MlpOptions, with_input: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        rows = x.reshape(-1, x.shape[-1])
        f = product(_start_gather(rows, options).wait(), w1, b1)
        a = activation_forward(f, options.activation, options.gated, options.kernels)
        ctx.save_for_backward(rows, f, None if options.gelu_checkpoint else a, w1, w2)
        ctx.options, ctx.with_bias = options, b1 is not None
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
        da = product(dy_rows, w2.t())
        how = options.activation, options.gated, a is None, ctx.with_bias, options.kernels
        df, db1, recomputed = activation_gradient(da, f, *how)
        a = recomputed if a is None else a
        assert a is not None, "it was kept or computed again"
        dw2 = weight_gradient(dy_rows, a)
        del da, a, recomputed  # (T, F), gone before the last two products ask for memory
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
