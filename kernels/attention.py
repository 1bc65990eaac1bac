"""Multi-head attention over a packed QKV projection, with key padding, causal order and packed documents.

Which engine computes it, by this rule:
  CUDA, kernels auto, head dim up to 128, no additive bias   our Triton kernels: scores never reach memory
  elsewhere without dropout                                  torch's scaled_dot_product_attention
  elsewhere with dropout                                     the explicit product below; torch's own falls back to a path
                                                             twice as slow on a CPU
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dropout import keep_mask, keep_scale
from .residual_norm import Kernels, uses_triton

_LARGEST_TRITON_HEAD = 128


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """Which keys each query may see; make one for all layers of a forward pass. Conditions hold together.

    causal: none behind the query. key_mask: (B, S) bool, only keys that are True (tokens, not padding).
    segment_ids: (B, S) int, only keys of the query's own segment.
    bias: (B or 1, 1 or N, S or 1, S), added to the scaled scores, in their dtype, finite; takes the place of the others.
    A query that sees no key gets a finite output, whose value depends on the engine.
    """

    causal: bool = False
    key_mask: Tensor | None = None
    segment_ids: Tensor | None = None
    bias: Tensor | None = None
    _additive: dict[Any, Tensor | None] = field(default_factory=dict, repr=False)

    def additive(self, size: int, like: Tensor) -> Tensor | None:
        """What to add to the scores: 0 where a query may see a key, a huge negative but finite value elsewhere.

        size: S; like: gives dtype and device. (B or 1, 1, S or 1, S), or None when every query sees every key.
        """
        if self.bias is not None:
            return self.bias
        key = (size, like.dtype, like.device)
        if key not in self._additive:
            self._additive[key] = self._make_additive(size, like)
        return self._additive[key]

    def _make_additive(self, size: int, like: Tensor) -> Tensor | None:
        allowed = None if self.key_mask is None else self.key_mask[:, None, None, :]
        if self.causal:
            order = torch.ones(size, size, dtype=torch.bool, device=like.device).tril_()[None, None]
            allowed = order if allowed is None else allowed & order
        if self.segment_ids is not None:
            same = (self.segment_ids[:, :, None] == self.segment_ids[:, None, :])[:, None]
            allowed = same if allowed is None else allowed & same
        if allowed is None:
            return None
        lowest = torch.finfo(like.dtype).min / 2  # half of it, or a negative score would take fp16 to -inf
        return torch.zeros(allowed.shape, dtype=like.dtype, device=like.device).masked_fill_(~allowed, lowest)


def attention(
    qkv: Tensor,
    mask: AttentionMask,
    p: float,
    seed: Tensor | None,
    site: int,
    *,
    dropout_checkpoint: bool = False,
    stochastic: bool = False,
    kernels: Kernels = "auto",
) -> Tensor:
    """The attention output before its projection, (B, S, H).

    qkv: (B, S, 3, N, D), any float dtype. p: dropout of the probabilities; seed: int64 scalar tensor, None for no dropout.
    dropout_checkpoint: do not keep the probabilities after dropout; the Triton path and the one without dropout keep nothing
        of size S * S in any case.
    stochastic: let the Triton backward add dQ atomically where that is faster; its last bits then vary from run to run.
    """
    if uses_triton(qkv, kernels) and qkv.shape[-1] <= _LARGEST_TRITON_HEAD and mask.bias is None:
        return _TritonAttention.apply(  # type: ignore[no-any-return, no-untyped-call]
            qkv, mask, p, seed, site, stochastic
        )
    bias = mask.additive(qkv.shape[1], qkv)
    if seed is not None and p > 0:
        return _AttentionWithDropout.apply(  # type: ignore[no-any-return, no-untyped-call]
            qkv, bias, p, seed, site, dropout_checkpoint
        )
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, mask: AttentionMask, p: float, seed: Tensor | None, site: int, stochastic: bool
    ) -> Tensor:
        from .attention_triton import forward

        seed = seed if p > 0 else None
        shared: dict[str, Any] = {"causal": mask.causal, "p": p, "site": site}
        out, lse = forward(qkv, key_mask=mask.key_mask, segment_ids=mask.segment_ids, seed=seed, **shared)
        ctx.save_for_backward(qkv, out, lse, mask.key_mask, mask.segment_ids, seed)
        ctx.shared, ctx.stochastic = shared, stochastic
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from .attention_backward_triton import backward

        qkv, out, lse, key_mask, segment_ids, seed = ctx.saved_tensors
        masks: dict[str, Any] = {"key_mask": key_mask, "segment_ids": segment_ids, "seed": seed}
        dqkv = backward(dy, qkv, out, lse, stochastic=ctx.stochastic, **masks, **ctx.shared)
        return dqkv, None, None, None, None, None


class _AttentionWithDropout(torch.autograd.Function):
    """softmax(q k' / sqrt(D) + bias), dropout, times v; the mask is drawn again in backward.

    drop_product: keep the probabilities before dropout only, and multiply by the mask again in backward.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, bias: Tensor | None, p: float, seed: Tensor, site: int, drop_product: bool
    ) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # each (B, N, S, D)
        scores = (q * (1 / math.sqrt(q.shape[-1]))).matmul(k.transpose(2, 3))  # (B, N, S, S)
        if bias is not None:
            scores.add_(bias)
        probabilities = torch.softmax(scores, -1)
        dropped = (probabilities * keep_mask(probabilities.shape, p, seed, site)).mul_(keep_scale(p))
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
