"""Linear layers whose weight is divided over the processes of a group, by columns or by rows."""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..parallel.collectives import (
    Group,
    Pending,
    check_divisible,
    group_size,
    start_all_gather,
    start_all_reduce_,
    start_reduce_scatter,
)
from .linear import Linear, linear, product, weight_gradient
from .operator import reshaped

ParallelMode = Literal[
    "column", "row"
]  # which features of the weight are divided: those of the output, or of the input


def column_parallel_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, group: Group, *, sequence_parallel: bool = False
) -> Tensor:
    """Return x @ weight.T + bias with this process's rows of the weight, (S, ..., N/t) in the dtype of x.

    x: replicated (S, ..., K), under sequence_parallel this process's (S/t, ..., K); weight: (N/t, K); bias: (N/t,) or None;
    one float dtype. dx has the shape of x and is complete, and so are the gradients of the shards.
    Kept for backward, besides the weight: x as given. Raises ValueError if the last dims of x and weight differ.
    """
    if group_size(group) == 1:
        return linear(x, weight, bias)
    _check_last_dim(x, weight)
    return Linear.apply(x, weight, bias, group, sequence_parallel)  # type: ignore[no-any-return, no-untyped-call]


def linear_and_input(
    x: Tensor, weight: Tensor, bias: Tensor | None, group: Group, *, sequence_parallel: bool = False
) -> tuple[Tensor, Tensor]:
    """Return `column_parallel_linear` of x, and x again for the residual stream that goes around the product.

    Backward adds the gradient of the second to dx, on a GPU within the product that makes dx, which overwrites that gradient:
    nobody else may keep it. `residual_norm` makes a new one for its residual.
    """
    _check_last_dim(x, weight)
    return Linear.apply(x, weight, bias, group, sequence_parallel, True)  # type: ignore[no-any-return, no-untyped-call]


def row_parallel_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, group: Group, *, sequence_parallel: bool = False
) -> Tensor:
    """Return x @ weight.T summed over the group, plus bias, in the dtype of x: replicated (S, ..., N).

    x: (S, ..., K/t); weight: (N, K/t), this process's columns; bias: (N,) or None, replicated, added once; one float dtype.
    Under sequence_parallel the result is this process's part (S/t, ..., N), and the gradient of the bias that of this part: see
    `sum_gradient_over`.
    Kept for backward, besides the weight: x. Raises ValueError if the last dims of x and weight differ, and under
    sequence_parallel if t does not divide S.
    """
    if group_size(group) == 1:
        return linear(x, weight, bias)
    _check_last_dim(x, weight)
    if sequence_parallel:
        check_divisible(x.shape[0], group, "the sequence, dim 0 of x,")
    return _RowParallelLinear.apply(x, weight, bias, group, sequence_parallel)


def _check_last_dim(x: Tensor, weight: Tensor) -> None:
    if x.dim() < 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x is {tuple(x.shape)}, this process's weight is {tuple(weight.shape)}; x must have 2 dims or more, and the last "
            f"dims must be equal"
        )


class _RowParallelLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup, sequence_parallel: bool
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(rows, weight)
        ctx.shape, ctx.group, ctx.sequence_parallel = x.shape, group, sequence_parallel
        start = start_reduce_scatter if sequence_parallel else start_all_reduce_
        y = start(product(rows, weight), group).wait()
        if bias is not None:
            y += bias  # behind the sum, or it would be added t times
        length = x.shape[0] // group.size() if sequence_parallel else x.shape[0]
        return reshaped(y, length, *x.shape[1:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        needs_dx, needs_dweight, needs_dbias = ctx.needs_input_grad[:3]
        dy_rows = dy.reshape(-1, dy.shape[-1])
        gathering = start_all_gather(dy_rows, ctx.group) if ctx.sequence_parallel else Pending(dy_rows)
        dbias = dy_rows.sum(0) if needs_dbias else None
        dy_rows = gathering.wait()
        dx = product(dy_rows, weight.t()).view(ctx.shape) if needs_dx else None
        dweight = weight_gradient(dy_rows, rows) if needs_dweight else None
        return dx, dweight, dbias, None, None
