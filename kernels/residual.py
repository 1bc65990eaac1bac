"""The end of each half of a layer: residual + dropout(x + bias)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dropout import keep_mask, keep_scale


class _DropoutResidual(torch.autograd.Function):
    """Saves neither input nor mask: backward draws the mask again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, p: float, seed: Tensor, site: int) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.p, ctx.site = p, site
        return torch.add(residual, x * keep_mask(x.shape, p, seed, site), alpha=keep_scale(p))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (seed,) = ctx.saved_tensors
        dx = (dy * keep_mask(dy.shape, ctx.p, seed, ctx.site)).mul_(keep_scale(ctx.p))
        return dx, dy, None, None, None


def dropout_residual(x: Tensor, residual: Tensor, p: float, seed: Tensor | None, site: int) -> Tensor:
    """residual + dropout(x), with the shape and dtype of x.

    x, residual: equal shapes, any float dtype, the bias of the projection already added (its GEMM adds it for free).
    seed: int64 scalar tensor, or None for no dropout (evaluation, or p = 0).
    """
    if seed is None or p == 0:
        return residual + x
    return _DropoutResidual.apply(x, residual, p, seed, site)  # type: ignore[no-any-return, no-untyped-call]


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: Tensor, site: int) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.p, ctx.site = p, site
        return (x * keep_mask(x.shape, p, seed, site)).mul_(keep_scale(p))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (seed,) = ctx.saved_tensors
        return (dy * keep_mask(dy.shape, ctx.p, seed, ctx.site)).mul_(keep_scale(ctx.p)), None, None, None


def dropout(x: Tensor, p: float, seed: Tensor | None, site: int) -> Tensor:
    """dropout(x), with the mask drawn from (seed, site); x itself when seed is None or p = 0."""
    if seed is None or p == 0:
        return x
    return _Dropout.apply(x, p, seed, site)  # type: ignore[no-any-return, no-untyped-call]
