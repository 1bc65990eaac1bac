"""The language-model head and its loss in one op, so that the logits of all tokens never exist at once."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..choices import IGNORED, Kernels, uses_triton
from ..linear import product, weight_gradient
from ..operator import operator

SoftmaxLoss = Callable[[Tensor, Tensor], Tensor]
"""(logits, labels) -> loss per row, as `softmax_loss_reference_` does it, logits becoming their gradient."""
_CHUNK_ELEMENTS = 2**25  # logits of one chunk: 128 MiB in fp32; smaller chunks spend their time on adding to dweight


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, kernels: Kernels = "auto"
) -> Tensor:
    """The sum over rows of -log softmax(hidden @ weight.T + bias)[label], fp32 (fp64 for fp64 input), shape ().

    hidden: (T, H), weight: (V, H), bias: (V,) or None, one float dtype; labels: (T,) int64 in [0, V), IGNORED rows add
    nothing. Divide by the number of labels outside, where the whole batch is known. The gradient is computed along with the
    loss, unless gradients are off. With a label of no row the Triton kernel's loss is NaN; PyTorch raises.
    Raises ValueError for labels of another shape or dtype.
    """
    return chunked_cross_entropy(hidden, weight, bias, labels, functools.partial(_softmax_loss_, kernels=kernels))


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, softmax_loss_: SoftmaxLoss
) -> Tensor:
    """The sum of softmax_loss_ over the logits hidden @ weight.T + bias, chunk by chunk; arguments as `linear_cross_entropy`'s.

    weight and bias may be one process's rows of the vocabulary, if softmax_loss_ knows of the others. The gradient of hidden
    is then this process's part of a sum.
    """
    if labels.shape != hidden.shape[:-1] or hidden.ndim != 2 or labels.dtype != torch.int64:
        raise ValueError(
            f"labels is {labels.dtype} {tuple(labels.shape)}, hidden {tuple(hidden.shape)}; they must be int64 (T,) and (T, H)"
        )
    if torch.is_grad_enabled():
        return _ChunkedCrossEntropy.apply(  # type: ignore[no-any-return, no-untyped-call]
            hidden, weight, bias, labels, softmax_loss_
        )
    loss = _zeros_like(hidden, ())
    for part, label in _chunks(hidden, labels, weight.shape[0]):
        loss += softmax_loss_(product(part, weight, bias), label).sum()
    return loss


def _chunks(hidden: Tensor, labels: Tensor, vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    rows = max(1, _CHUNK_ELEMENTS // vocabulary)
    return zip(hidden.split(rows), labels.split(rows), strict=True)


def _zeros_like(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A sum over chunks that starts: fp32 or wider, because a running sum in half precision stops growing."""
    return torch.zeros(shape, dtype=torch.promote_types(tensor.dtype, torch.float32), device=tensor.device)


def _summed(total: Tensor | None, chunk: Tensor) -> Tensor:
    return chunk if total is None else total.add_(chunk)


def _weight_gradient(dlogits: Tensor, part: Tensor) -> Tensor:
    """Return `weight_gradient` of one chunk, in fp32 for fp16: sums over rows leave its range, and no loss scale is in yet."""
    if part.dtype != torch.float16:
        return weight_gradient(dlogits, part)
    if part.is_cuda:
        return torch.mm(dlogits.t(), part, out_dtype=torch.float32)
    return weight_gradient(dlogits.float(), part.float())


def softmax_loss_reference_(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label] per row, fp32 or wider (rows,), 0 for IGNORED; logits become the gradient of the sum.

    logits: (rows, V), labels: (rows,) int64.
    """
    kept = labels != IGNORED
    target = labels.masked_fill(~kept, 0)[:, None]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logs = torch.log_softmax(wide, -1)
    loss = logs.gather(1, target).squeeze(1).neg_().masked_fill_(~kept, 0.0)
    dlogs = wide.zero_().scatter_(1, target, kept[:, None].to(wide.dtype).neg_())
    # torch's own backward, as its exp is the vectorized one
    torch.ops.aten._log_softmax_backward_data.out(dlogs, logs, -1, wide.dtype, out=wide)
    if wide is not logits:
        logits.copy_(wide)
    return loss


@operator(
    "softmax_loss_(Tensor(a!) logits, Tensor labels, str kernels) -> Tensor",
    lambda logits, labels, _: logits.new_empty(labels.shape[0], dtype=torch.promote_types(logits.dtype, torch.float32)),
)
def _softmax_loss_(logits: Tensor, labels: Tensor, kernels: Kernels) -> Tensor:
    """As `softmax_loss_reference_`, on the path that `kernels` and the device choose."""
    if uses_triton(logits, kernels):
        from .cross_entropy_triton import softmax_loss_

        return softmax_loss_(logits, labels)
    return softmax_loss_reference_(logits, labels)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, softmax_loss_: SoftmaxLoss
    ) -> Tensor:
        loss, dweight, dbias = _zeros_like(hidden, ()), None, None
        dhidden = []
        for part, label in _chunks(hidden, labels, weight.shape[0]):
            dlogits = product(part, weight, bias)  # the logits until the next line
            loss += softmax_loss_(dlogits, label).sum()
            dhidden.append(product(dlogits, weight.t()))
            dweight = _summed(dweight, _weight_gradient(dlogits, part).to(loss.dtype))
            if bias is not None:
                dbias = _summed(dbias, dlogits.sum(0, dtype=loss.dtype))
        ctx.save_for_backward(dhidden[0] if len(dhidden) == 1 else torch.cat(dhidden), dweight, dbias)
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
