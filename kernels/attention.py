"""Multi-head attention over a packed QKV projection, with key padding, causal order, packed documents, packed batches.

Which engine computes it, by this rule:
  CUDA, kernels auto, head dim up to 128, no additive bias   our Triton kernels: scores never reach memory
  elsewhere without dropout                                  torch's scaled_dot_product_attention
  elsewhere with dropout                                     the explicit product below; torch's own falls back to a path
                                                             twice as slow on a CPU
Only the first knows packed batches; for the others the sequences are padded here and their padding taken out again.
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
    cu_seqlens: (B + 1,) int32, 0 and the end of each sequence: the batch is packed, T rows of tokens in place of B x S,
        sequence after sequence up to the last row, and a query sees its own sequence. Goes with causal alone.
    max_length: S of a packed batch, no less than its longest sequence; a number, since no kernel can start before the host
        knows it. Dropout decides as it would in the padded batch (B, max_length).
    A query that sees no key gets a finite output, whose value depends on the engine.
    Raises ValueError for fields that do not go together. Whether cu_seqlens rises by at most max_length is checked on a CPU
    only: on a GPU that would make the host wait.
    """

    causal: bool = False
    key_mask: Tensor | None = None
    segment_ids: Tensor | None = None
    bias: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_length: int | None = None
    _made: dict[Any, Tensor | None] = field(default_factory=dict, repr=False)  # what all layers share

    def __post_init__(self) -> None:
        if (self.cu_seqlens is None) != (self.max_length is None):
            raise ValueError("cu_seqlens and max_length describe a packed batch together; give both or neither")
        if self.cu_seqlens is not None and self.max_length is not None:
            for name in ("key_mask", "segment_ids", "bias"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is for padded batches, cu_seqlens for packed ones; give one of the two")
            _check_borders(self.cu_seqlens, self.max_length)

    def rows_when_padded(self, num_tokens: int) -> Tensor | None:
        """The row of each token of a packed batch among the B * max_length rows of the padded one, (T,) int64."""
        if self.cu_seqlens is not None and self.max_length is not None and "rows" not in self._made:
            first = self.cu_seqlens[:-1]
            shift = torch.arange(first.shape[0], device=first.device) * self.max_length - first
            # with output_size, or the host would wait for a GPU to tell it
            shifts = shift.repeat_interleave(self.cu_seqlens.diff(), output_size=num_tokens)
            self._made["rows"] = torch.arange(num_tokens, device=first.device) + shifts
        return self._made.get("rows")

    def additive(self, size: int, like: Tensor) -> Tensor | None:
        """What to add to the scores: 0 where a query may see a key, a huge negative but finite value elsewhere.

        size: S; like: gives dtype and device. (B or 1, 1, S or 1, S), or None when every query sees every key.
        """
        if self.bias is not None:
            return self.bias
        key = (size, like.dtype, like.device)
        if key not in self._made:
            self._made[key] = self._make_additive(size, like)
        return self._made[key]

    def _make_additive(self, size: int, like: Tensor) -> Tensor | None:
        key_mask = self.key_mask
        if self.cu_seqlens is not None:
            key_mask = torch.arange(size, device=like.device) < self.cu_seqlens.diff()[:, None]
        allowed = None if key_mask is None else key_mask[:, None, None, :]
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


def _check_borders(cu_seqlens: Tensor, max_length: int) -> None:
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}; it must be int32 (B + 1,)")
    if cu_seqlens.is_cpu and not torch.compiler.is_compiling():
        lengths = cu_seqlens.diff()
        if cu_seqlens[0] != 0 or lengths.min() < 0 or lengths.max() > max_length:
            raise ValueError(
                f"cu_seqlens={cu_seqlens.tolist()} with max_length={max_length}; it must begin with 0 and rise by 0 to "
                f"max_length from one border to the next"
            )


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
    """The attention output before its projection, (B, S, H), or (T, H) for a packed batch.

    qkv: (B, S, 3, N, D), or (T, 3, N, D) where the mask has cu_seqlens; any float dtype.
    p: dropout of the probabilities; seed: int64 scalar tensor, None for no dropout.
    dropout_checkpoint: do not keep the probabilities after dropout; the Triton path and the one without dropout keep nothing
        of size S * S in any case.
    stochastic: let the Triton backward add dQ atomically where that is faster; its last bits then vary from run to run.
    Raises ValueError for a packed qkv without a mask that has cu_seqlens, and the other way round.
    """
    if qkv.ndim != (5 if mask.cu_seqlens is None else 4):
        raise ValueError(
            f"qkv is {tuple(qkv.shape)}; it must be (T, 3, N, D) with a mask that has cu_seqlens, else (B, S, 3, N, D)"
        )
    if uses_triton(qkv, kernels) and qkv.shape[-1] <= _LARGEST_TRITON_HEAD and mask.bias is None:
        return _TritonAttention.apply(  # type: ignore[no-any-return, no-untyped-call]
            qkv, mask, p, seed, site, stochastic
        )
    rows = mask.rows_when_padded(qkv.shape[0])
    bias = mask.additive(qkv.shape[1] if mask.max_length is None else mask.max_length, qkv)
    if seed is not None and p > 0:
        return _AttentionWithDropout.apply(  # type: ignore[no-any-return, no-untyped-call]
            qkv, bias, rows, seed, _Dropout(p, site, dropout_checkpoint)
        )
    q, k, v = (part.transpose(1, 2) for part in _padded(qkv, rows, bias).unbind(2))
    return _unpadded(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2), rows)


def _padded(x: Tensor, rows: Tensor | None, scores: Tensor | None) -> Tensor:
    """A tensor (T, ...) as (B, S, ...) with zeros at padding; x itself where rows is None, as it is padded then.

    rows: of `AttentionMask.rows_when_padded`; scores: something (B, ..., S), for the sizes.
    """
    if rows is None:
        return x
    assert scores is not None, "a packed batch has a bias, which hides its padding"
    batch, size = scores.shape[0], scores.shape[-1]
    return x.new_zeros((batch * size, *x.shape[1:])).index_copy_(0, rows, x).unflatten(0, (batch, size))


def _unpadded(x: Tensor, rows: Tensor | None) -> Tensor:
    """The inverse of `_padded`."""
    return x if rows is None else x.flatten(0, 1).index_select(0, rows)


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, mask: AttentionMask, p: float, seed: Tensor | None, site: int, stochastic: bool
    ) -> Tensor:
        from .attention_triton import forward

        seed = seed if p > 0 else None
        shared: dict[str, Any] = {"causal": mask.causal, "max_length": mask.max_length, "p": p, "site": site}
        masks: dict[str, Any] = {
            "key_mask": mask.key_mask,
            "segment_ids": mask.segment_ids,
            "cu_seqlens": mask.cu_seqlens,
        }
        out, lse = forward(qkv, seed=seed, **masks, **shared)
        ctx.save_for_backward(qkv, out, lse, seed, *masks.values())
        ctx.shared, ctx.stochastic = shared, stochastic
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from .attention_backward_triton import backward

        qkv, out, lse, seed, key_mask, segment_ids, cu_seqlens = ctx.saved_tensors
        masks: dict[str, Any] = {"key_mask": key_mask, "segment_ids": segment_ids, "cu_seqlens": cu_seqlens}
        dqkv = backward(dy, qkv, out, lse, seed=seed, stochastic=ctx.stochastic, **masks, **ctx.shared)
        return dqkv, None, None, None, None, None


@dataclass(frozen=True)
class _Dropout:
    """checkpoint: keep the probabilities before dropout only, and multiply by the mask again in backward."""

    p: float
    site: int
    checkpoint: bool


class _AttentionWithDropout(torch.autograd.Function):
    """softmax(q k' / sqrt(D) + bias), dropout, times v; the mask is drawn again in backward.

    rows: None, or those of a packed batch, which is padded within forward and within backward, so that what is kept of qkv
    is packed.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, bias: Tensor | None, rows: Tensor | None, seed: Tensor, dropout: _Dropout
    ) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in _padded(qkv, rows, bias).unbind(2))  # each (B, N, S, D)
        scores = (q * (1 / math.sqrt(q.shape[-1]))).matmul(k.transpose(2, 3))  # (B, N, S, S)
        if bias is not None:
            scores.add_(bias)
        probabilities = torch.softmax(scores, -1)
        kept = keep_mask(probabilities.shape, dropout.p, seed, dropout.site)
        dropped = (probabilities * kept).mul_(keep_scale(dropout.p))
        ctx.save_for_backward(qkv, probabilities, None if dropout.checkpoint else dropped, rows, seed)
        ctx.dropout = dropout
        return _unpadded(dropped.matmul(v).transpose(1, 2).flatten(2), rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        qkv, probabilities, dropped, rows, seed = ctx.saved_tensors
        padded_qkv, padded_dy = _padded(qkv, rows, probabilities), _padded(dy, rows, probabilities)
        q, k, v = (part.transpose(1, 2) for part in padded_qkv.unbind(2))
        scale = keep_scale(ctx.dropout.p)
        mask = keep_mask(probabilities.shape, ctx.dropout.p, seed, ctx.dropout.site)
        if dropped is None:
            dropped = (probabilities * mask).mul_(scale)
        dcontext = padded_dy.unflatten(2, (q.shape[1], q.shape[3])).transpose(1, 2)  # (B, N, S, D)
        dprobabilities = dcontext.matmul(v.transpose(2, 3)).mul_(mask).mul_(scale)
        dscores = torch._softmax_backward_data(dprobabilities, probabilities, -1, probabilities.dtype)
        dscores.mul_(1 / math.sqrt(q.shape[-1]))
        dqkv = torch.empty_like(padded_qkv)
        dq, dk, dv = (part.transpose(1, 2) for part in dqkv.unbind(2))
        dq.copy_(dscores.matmul(k))
        dk.copy_(dscores.transpose(2, 3).matmul(q))
        dv.copy_(dropped.transpose(2, 3).matmul(dcontext))
        return _unpadded(dqkv, rows), None, None, None, None
