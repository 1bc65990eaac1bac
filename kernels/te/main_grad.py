"""The linear layer whose weight gradient goes to a buffer of the trainer, `weight.main_grad`, in place of `.grad`."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..linear import product, weight_gradient


def linear_into_main_grad(
    inp: Tensor, weight: Tensor, bias: Tensor | None, main_grad: Tensor, *, overwrite: bool
) -> Tensor:
    """inp @ weight.T + bias; backward adds the weight's gradient to main_grad, or puts it there if overwrite.

    inp: (..., K); weight: (N, K); bias: (N,) or None; main_grad: (N, K), any float dtype, usually fp32. Autograd gets no
    gradient of the weight, so `.grad` stays None and hooks on the weight stay silent.
    """
    return _Linear.apply(inp, weight, bias, main_grad, overwrite)  # type: ignore[no-any-return, no-untyped-call]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inp: Tensor, weight: Tensor, bias: Tensor | None, main_grad: Tensor, overwrite: bool
    ) -> Tensor:
        rows = inp.reshape(-1, inp.shape[-1])
        ctx.save_for_backward(rows, weight)
        ctx.main_grad = main_grad  # not saved: the backward of another micro-batch may change it before this one's
        ctx.overwrite, ctx.has_bias = overwrite, bias is not None
        return product(rows, weight, bias).view(*inp.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        dy_rows = dy.reshape(-1, dy.shape[-1])
        dweight = weight_gradient(dy_rows, rows)
        if ctx.overwrite:
            ctx.main_grad.copy_(dweight)
        else:
            ctx.main_grad.add_(dweight)
        dinp = product(dy_rows, weight.t()).view(*dy.shape[:-1], weight.shape[1]) if ctx.needs_input_grad[0] else None
        return dinp, None, dy_rows.sum(0) if ctx.has_bias else None, None, None
