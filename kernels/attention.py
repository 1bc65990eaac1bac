"""Multi-head attention over a packed QKV projection, with key padding, causal order and packed documents.

Two engines compute the same function on a CPU, chosen by this rule: without dropout, torch's fused attention; with dropout,
the explicit product below, because torch's falls back to a path twice as slow there.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dropout import keep_mask, keep_scale


def attention_bias(
    key_mask: Tensor | None, causal: bool, segment_ids: Tensor | None, size: int, like: Tensor
) -> Tensor | None:
    """What to add to the scores: 0 where a query may see a key, a huge negative but finite value elsewhere.

    key_mask: (B, S) bool, True = a token; segment_ids: (B, S) int, queries see only keys of their own segment;
    size: S; like: gives dtype and device. Returns (B or 1, 1, S or 1, S), or None when every query sees every key.
    Finite, because a row without any visible key would turn into NaN with -inf; such a row attends evenly instead.
    Build it once for all layers of a model.
    """
    allowed = None if key_mask is None else key_mask[:, None, None, :]
    if causal:
        order = torch.ones(size, size, dtype=torch.bool, device=like.device).tril_()[None, None]
        allowed = order if allowed is None else allowed & order
    if segment_ids is not None:
        same = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
        allowed = same if allowed is None else allowed & same
    if allowed is None:
        return None
    lowest = torch.finfo(like.dtype).min / 2  # half of it, or a negative score would take fp16 to -inf
    return torch.zeros(allowed.shape, dtype=like.dtype, device=like.device).masked_fill_(~allowed, lowest)


class _AttentionWithDropout(torch.autograd.Function):
    """softmax(q k' / sqrt(D) + bias), dropout, times v; the mask is drawn again in backward.

    drop_product: keep the probabilities before dropout only, and multiply by the mask again in backward.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, bias: Tensor | None, p: float, seed: Tensor, site: int, drop_product: bool
    ) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # each (B, N, S, D)
        probabilities = _softmax_scores(q, k, bias)
        dropped = _dropped(probabilities, p, seed, site)
        ctx.save_for_backward(qkv, probabilities, None if drop_product else dropped, seed)
        ctx.p, ctx.site = p, site
        return dropped.matmul(v).transpose(1, 2).flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        qkv, probabilities, dropped, seed = ctx.saved_tensors
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        mask = keep_mask(probabilities.shape, ctx.p, seed, ctx.site)
        if dropped is None:
            dropped = (probabilities * mask).mul_(keep_scale(ctx.p))
        dcontext = dy.unflatten(2, (q.shape[1], q.shape[3])).transpose(1, 2)  # (B, N, S, D)
        dprobabilities = dcontext.matmul(v.transpose(2, 3)).mul_(mask).mul_(keep_scale(ctx.p))
        dscores = torch._softmax_backward_data(dprobabilities, probabilities, -1, probabilities.dtype)
        dscores.mul_(1 / math.sqrt(q.shape[-1]))
        dqkv = torch.empty_like(qkv)
        dq, dk, dv = (part.transpose(1, 2) for part in dqkv.unbind(2))
        dq.copy_(dscores.matmul(k))
        dk.copy_(dscores.transpose(2, 3).matmul(q))
        dv.copy_(dropped.transpose(2, 3).matmul(dcontext))
        return dqkv, None, None, None, None, None


def _softmax_scores(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    scores = (q * (1 / math.sqrt(q.shape[-1]))).matmul(k.transpose(2, 3))  # (B, N, S, S)
    if bias is not None:
        scores.add_(bias)
    return torch.softmax(scores, -1)


def _dropped(probabilities: Tensor, p: float, seed: Tensor, site: int) -> Tensor:
    return (probabilities * keep_mask(probabilities.shape, p, seed, site)).mul_(keep_scale(p))


def attention(
    qkv: Tensor, bias: Tensor | None, p: float, seed: Tensor | None, site: int, *, dropout_checkpoint: bool = False
) -> Tensor:
    """The attention output before its projection, (B, S, H).

    qkv: (B, S, 3, N, D), any float dtype; bias: from `attention_bias`, or None.
    p: dropout of the probabilities; seed: int64 scalar tensor, or None for no dropout.
    dropout_checkpoint: do not keep the probabilities after dropout; without dropout nothing of size S * S is kept anyway.
    """
    if seed is not None and p > 0:
        return _AttentionWithDropout.apply(  # type: ignore[no-any-return, no-untyped-call]
            qkv, bias, p, seed, site, dropout_checkpoint
        )
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
