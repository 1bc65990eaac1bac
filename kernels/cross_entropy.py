"""The language-model head and its loss in one op, so that the logits of all tokens never exist at once."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .linear import product
from .residual_norm import Kernels, uses_triton

IGNORED = -100
_CHUNK_ELEMENTS = 2**25  # logits of one chunk: 128 MiB in fp32; smaller chunks spend their time on adding to dweight


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, kernels: Kernels = "auto"
) -> Tensor:
    """The sum over rows of -log softmax(hidden @ weight.T + bias)[label], fp32 (fp64 for fp64 input), shape ().

    hidden: (T, H), weight: (V, H), bias: (V,) or None, one float dtype; labels: (T,) int64, IGNORED rows add nothing.
    Divide by the number of labels outside, where the whole batch is known. The gradient is computed along with the loss.
    """
    return _LinearCrossEntropy.apply(  # type: ignore[no-any-return, no-untyped-call]
        hidden, weight, bias, labels, kernels
    )


def _softmax_loss_reference(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The summed loss, (), and its gradient, (rows, V), which overwrites logits (rows, V)."""
    kept, target = labels != IGNORED, labels.clamp(min=0)[:, None]
    normalizer = logits.logsumexp(-1, keepdim=True)
    loss = (normalizer - logits.gather(1, target)).squeeze(1).masked_fill(~kept, 0.0).sum()
    dlogits = logits.sub_(normalizer).exp_()
    dlogits.scatter_add_(1, target, torch.full_like(target, -1, dtype=logits.dtype))
    return loss, dlogits.mul_(kept[:, None])


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, kernels: Kernels
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        needs_grad = any(ctx.needs_input_grad)
        on_triton = uses_triton(hidden, kernels)
        dhidden = torch.empty_like(hidden) if needs_grad else None
        # fp32, because a half-precision running sum over chunks stops growing
        dweight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if needs_grad else None
        dbias = None if bias is None or not needs_grad else torch.zeros(bias.shape, dtype=wide, device=bias.device)
        rows = max(1, _CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            part, label = hidden[start : start + rows], labels[start : start + rows]
            logits = product(part, weight, bias)
            if on_triton:
                from .cross_entropy_triton import softmax_loss_

                loss += softmax_loss_(logits, label).sum()
                dlogits = logits  # overwritten by the kernel
            else:
                part_loss, dlogits = _softmax_loss_reference(logits.to(wide), label)
                loss += part_loss
                dlogits = dlogits.to(hidden.dtype)
            if dhidden is None or dweight is None:
                continue
            dhidden[start : start + rows] = product(dlogits, weight.t())
            dweight += product(dlogits.t(), part.t())
            if dbias is not None:
                dbias += dlogits.sum(0)
        if needs_grad:
            ctx.save_for_backward(dhidden, dweight, dbias)
            ctx.dtype = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight, dbias = ctx.saved_tensors
        return (
            (dhidden * dloss).to(dhidden.dtype),
            (dweight * dloss).to(ctx.dtype),
            None if dbias is None else (dbias * dloss).to(ctx.dtype),
            None,
            None,
        )
