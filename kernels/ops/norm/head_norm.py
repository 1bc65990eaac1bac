"""RMSNorm over the columns of each query and key head, as Qwen3 and others have it before attention, in one pass each way.

Forward, per head: x_hat = x / sqrt(mean(x**2) + eps);  y = x_hat * weight, with one weight for queries and one for keys.
Backward: as RMSNorm in residual_norm.py; the gradients of the weights are sums over tokens and heads.
Source: Henry et al., Query-Key Normalization for Transformers, arXiv 2010.04245, with RMSNorm, arXiv 1910.07467.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..choices import Kernels, uses_triton
from ..operator import operator, reshaped
from .row_norms import rms_norm, rms_norm_gradients


def head_norm(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    *,
    eps: float,
    key_heads: int | None = None,
    kernels: Kernels = "auto",
) -> Tensor:
    """Return qkv with RMSNorm over the columns of its query and key heads, and its values as they are, as a new tensor.

    qkv: (..., 3, N, D), or with key_heads = G (..., N + 2G, D): N query heads, G key heads, G value heads; q_weight, k_weight:
    (D,). Where processes share the heads, the gradients of the weights are this process's parts of a sum.
    Kept for backward: qkv, and one number per normed head in fp32. Raises ValueError for shapes that do not fit, and on a GPU
    for float64 or D over 8192.
    """
    heads = qkv.shape[-2] * (3 if key_heads is None else 1)
    keys = qkv.shape[-2] if key_heads is None else key_heads
    if (key_heads is None and qkv.shape[-3] != 3) or not 0 < 2 * keys < heads:
        raise ValueError(f"qkv {tuple(qkv.shape)} does not fit key_heads={key_heads}; see attention for its two forms")
    if q_weight.shape != qkv.shape[-1:] or k_weight.shape != qkv.shape[-1:]:
        raise ValueError(
            f"q_weight {tuple(q_weight.shape)} and k_weight {tuple(k_weight.shape)} do not fit heads of {qkv.shape[-1]} columns"
        )
    return _HeadNorm.apply(qkv, q_weight, k_weight, eps, heads, keys, kernels)  # type: ignore[no-any-return, no-untyped-call]


def head_norm_forward_reference(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, key_heads: int
) -> tuple[Tensor, Tensor]:
    """Return out (T, N + 2G, D) and rstd (T, N + G), fp32 or wider, of qkv (T, N + 2G, D)."""
    sizes = _sizes(qkv, key_heads)
    q, k, v = qkv.split(sizes, 1)
    if torch.compiler.is_exporting():
        (q, q_rstd), (k, k_rstd) = rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)
        return torch.cat((q, k, v), 1), torch.cat((q_rstd, k_rstd), 1)
    out = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    q_out, k_out, v_out = out.split(sizes, 1)
    q_rstd, k_rstd = rms_norm(q, q_weight, eps, q_out)[1], rms_norm(k, k_weight, eps, k_out)[1]
    v_out.copy_(v)
    return out, torch.cat((q_rstd, k_rstd), 1)


def head_norm_backward_reference(
    dout: Tensor, qkv: Tensor, rstd: Tensor, q_weight: Tensor, k_weight: Tensor, key_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dqkv (T, N + 2G, D), dq_weight and dk_weight (D,)."""
    dqkv, sizes = torch.empty_like(qkv, memory_format=torch.contiguous_format), _sizes(qkv, key_heads)
    (dq, dk, dv), (q, k, _), (q_out, k_out, v_out) = (tensor.split(sizes, 1) for tensor in (dout, qkv, dqkv))
    q_rstd, k_rstd = rstd.split(sizes[:2], 1)
    v_out.copy_(dv)
    return (
        dqkv,
        rms_norm_gradients(dq, q, q_rstd, q_weight, q_out),
        rms_norm_gradients(dk, k, k_rstd, k_weight, k_out),
    )


def _sizes(qkv: Tensor, key_heads: int) -> tuple[int, int, int]:
    return qkv.shape[1] - 2 * key_heads, key_heads, key_heads


@operator(
    "head_norm_forward(Tensor qkv, Tensor q_weight, Tensor k_weight, float eps, int key_heads, str kernels) "
    "-> (Tensor, Tensor)",
    lambda qkv, q_weight, k_weight, eps, key_heads, kernels: (
        qkv.new_empty(qkv.shape),
        qkv.new_empty((qkv.shape[0], qkv.shape[1] - key_heads), dtype=torch.promote_types(qkv.dtype, torch.float32)),
    ),
)
def _forward(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, key_heads: int, kernels: Kernels
) -> tuple[Tensor, Tensor]:
    """Return out (T, N + 2G, D) and rstd (T, N + G)."""
    if uses_triton(qkv, kernels):
        from .head_norm_triton import head_norm_forward as forward
    else:
        forward = head_norm_forward_reference
    return forward(qkv, q_weight, k_weight, eps, key_heads)


@operator(
    "head_norm_backward(Tensor dout, Tensor qkv, Tensor rstd, Tensor q_weight, Tensor k_weight, int key_heads, str kernels) "
    "-> (Tensor, Tensor, Tensor)",
    lambda dout, qkv, rstd, q_weight, k_weight, key_heads, kernels: (
        qkv.new_empty(qkv.shape),
        torch.empty_like(q_weight),
        torch.empty_like(k_weight),
    ),
)
def _backward(
    dout: Tensor, qkv: Tensor, rstd: Tensor, q_weight: Tensor, k_weight: Tensor, key_heads: int, kernels: Kernels
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dqkv (T, N + 2G, D), dq_weight and dk_weight (D,)."""
    if uses_triton(qkv, kernels):
        from .head_norm_triton import head_norm_backward as backward
    else:
        backward = head_norm_backward_reference
    return backward(dout, qkv, rstd, q_weight, k_weight, key_heads)


class _HeadNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, *options: Any) -> Tensor:
        heads, key_heads, kernels = options
        rows = qkv.reshape(-1, heads, qkv.shape[-1])
        out, rstd = _forward(rows, q_weight, k_weight, eps, key_heads, kernels)
        ctx.save_for_backward(rows, rstd, q_weight, k_weight)
        ctx.key_heads, ctx.kernels = key_heads, kernels
        return reshaped(out, *qkv.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        qkv, rstd, q_weight, k_weight = ctx.saved_tensors
        rows = dout.reshape(qkv.shape)
        dqkv, dq_weight, dk_weight = _backward(rows, qkv, rstd, q_weight, k_weight, ctx.key_heads, ctx.kernels)
        return dqkv.view(dout.shape), dq_weight, dk_weight, None, None, None, None
