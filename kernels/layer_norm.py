"""LayerNorm, and the form that drops its input and recovers it from the output (`normalize_invertible`)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Recovering x_hat = (y - bias) / weight multiplies the rounding error of y by about (|bias| + |weight|) / |weight|. Above
# these bounds the gradient of a column's weight is off by more than about a percent, so that column's call keeps the input.
_LARGEST_AMPLIFICATION = {torch.float64: 1e12, torch.float32: 1e4, torch.float16: 32.0, torch.bfloat16: 8.0}


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, invertible: bool = False) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dim, with the shape and dtype of x.

    x: (..., H), any float dtype; weight, bias: (H,). Statistics are fp32 or wider; the variance is the biased one.
    invertible: save the output and the reciprocal deviation instead of the input, where the weight is far enough from zero
    for the inversion to be accurate (else save the input as usual). It saves memory where the output is kept anyway, as it is
    by a projection behind it.
    Source: Ba et al., Layer Normalization, arXiv 1607.06450.
    """
    if invertible and torch.is_grad_enabled() and is_invertible(weight, bias, x.dtype):
        return _InvertibleLayerNorm.apply(x, weight, bias, eps)  # type: ignore[no-any-return, no-untyped-call]
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def is_invertible(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> bool:
    """Whether every column's input can be recovered from an output of `dtype` to about one percent of its gradient."""
    with torch.no_grad():
        magnitude = weight.abs().float()
        worst = ((bias.abs().float() + magnitude) / magnitude).max()
    return bool(worst <= _LARGEST_AMPLIFICATION[dtype])  # inf and nan (weight = 0) compare false


class _InvertibleLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, _, rstd = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(y, rstd, weight, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        y, rstd, weight, bias = ctx.saved_tensors
        wide = torch.promote_types(y.dtype, torch.float32)  # sums over H in half precision would lose the gradient
        x_hat = (y.to(wide) - bias.to(wide)) / weight.to(wide)
        g = dy.to(wide)
        rows = tuple(range(y.dim() - 1))
        dweight, dbias = (g * x_hat).sum(rows), g.sum(rows)
        g = g * weight.to(wide)
        dx = (g - x_hat * (g * x_hat).mean(-1, keepdim=True) - g.mean(-1, keepdim=True)) * rstd.to(wide)
        return dx.to(y.dtype), dweight.to(weight.dtype), dbias.to(bias.dtype), None
