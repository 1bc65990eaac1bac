"""The second half of the feed-forward part: GELU, then the projection back to H, as one op that may drop GELU's output."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Activation = Literal["gelu", "gelu_tanh"]
_APPROXIMATION = {"gelu": "none", "gelu_tanh": "tanh"}


def gelu(x: Tensor, activation: Activation) -> Tensor:
    """GELU(x): x * Phi(x) for `gelu`, its tanh approximation for `gelu_tanh`. Source: arXiv 1606.08415."""
    return F.gelu(x, approximate=_APPROXIMATION[activation])


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor, activation: Activation, *, checkpoint: bool) -> Tensor:
    """GELU(x) @ weight.T + bias.

    x: (..., F), weight: (H, F), bias: (H,) -> (..., H), dtype of x.
    checkpoint: keep only x for backward and compute GELU(x) again there; otherwise both are kept.
    """
    if checkpoint and torch.is_grad_enabled():
        return _RecomputedGeluLinear.apply(x, weight, bias, activation)  # type: ignore[no-any-return, no-untyped-call]
    return F.linear(gelu(x, activation), weight, bias)


class _RecomputedGeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.activation = activation
        return F.linear(gelu(x, activation), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat = dy.reshape(-1, dy.shape[-1])
        a = gelu(x, ctx.activation)
        dweight = flat.t().mm(a.reshape(-1, a.shape[-1]))
        da = flat.mm(weight).view_as(x)
        dx = torch.ops.aten.gelu_backward(da, x, approximate=_APPROXIMATION[ctx.activation])
        return dx, dweight, flat.sum(0), None
