"""Attention with dropout by products of whole matrices of scores, with its gradient: what CPUs run and tests compare with."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dropout import keep_mask, keep_scale
from ..operator import operator, reused

if TYPE_CHECKING:
    from .attention import Recompute


def padded(x: Tensor, rows: Tensor | None, scores: Tensor | None) -> Tensor:
    """A tensor (T, ...) as (B, S, ...) with zeros at padding; x itself where rows is None, as it is padded then.

    rows: of `AttentionMask.rows_when_padded`; scores: something (B, ..., S), for the sizes.
    """
    if rows is None:
        return x
    assert scores is not None, "a packed batch has a bias, which hides its padding"
    batch, size = scores.shape[0], scores.shape[-1]
    return x.new_zeros((batch * size, *x.shape[1:])).index_copy_(0, rows, x).unflatten(0, (batch, size))


def unpadded(x: Tensor, rows: Tensor | None) -> Tensor:
    """The inverse of `padded`."""
    return x if rows is None else x.flatten(0, 1).index_select(0, rows)


def _heads_first(qkv: Tensor) -> Tensor:
    """(3, B * N, S, D), contiguous, from (B, S, 3, N, D): the products below would copy each part otherwise, each time."""
    return qkv.permute(2, 0, 3, 1, 4).contiguous().flatten(1, 2)


def _bmm(a: Tensor, b: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """scale * (a @ b) of (.., M, K) and (.., K, N), three dims each; the factor costs nothing inside the product."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale, out=out)


def _scores(parts: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """q k' / sqrt(D) + bias, (B * N, S, S), of the parts of `_heads_first`."""
    q, k, _ = parts.unbind()
    scores = _bmm(q, k.transpose(1, 2), 1 / math.sqrt(q.shape[-1]))
    if bias is not None:
        scores.unflatten(0, (-1, heads)).add_(bias)
    return scores


def _fake_product_forward(qkv: Tensor, bias: Tensor | None, rows: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    heads, size = qkv.shape[-2:]
    batch, length = qkv.shape[:2] if bias is None or rows is None else (bias.shape[0], bias.shape[-1])
    kept = qkv.new_empty((batch * heads, length, length))
    dropped = qkv.new_empty(kept.shape if rest[-1] else 0)
    out = qkv.new_empty((*qkv.shape[:-3], heads * size))
    return out, qkv.new_empty((3, batch * heads, length, size)), kept, dropped


@operator(
    "attention_product_forward(Tensor qkv, Tensor? bias, Tensor? rows, Tensor seed, float p, int site, bool keep_dropped) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fake_product_forward,
)
def _product_forward(qkv: Tensor, bias: Tensor | None, rows: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    """The output, qkv as `_heads_first` has it, and the probabilities (B * N, S, S) before and after dropout.

    Those after dropout lack its factor, and are empty without keep_dropped.
    """
    seed, p, site, keep_dropped = rest
    whole = padded(qkv, rows, bias)
    batch, length, _, heads, size = whole.shape
    parts = _heads_first(whole)
    scores = _scores(parts, bias, heads)
    probabilities = torch.softmax(scores, -1)
    dropped = torch.mul(probabilities, keep_mask(scores.shape, p, seed, site), out=reused(scores))
    context = _bmm(dropped, parts[2], keep_scale(p)).view(batch, heads, length, size).transpose(1, 2).flatten(2)
    return unpadded(context, rows), parts, probabilities, dropped if keep_dropped else qkv.new_empty(0)


@operator(
    "attention_probabilities(Tensor parts, Tensor? bias, int heads) -> Tensor",
    lambda parts, bias, heads: parts.new_empty((*parts.shape[1:3], parts.shape[2])),
)
def _probabilities(parts: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """The probabilities before dropout, (B * N, S, S), once more."""
    return torch.softmax(_scores(parts, bias, heads), -1)


@operator(
    "attention_product_backward(Tensor dout, Tensor parts, Tensor probabilities, Tensor? dropped, Tensor seed, float p, "
    "int site) -> Tensor",
    lambda dout, parts, *_: parts.new_empty((*dout.shape[:2], 3, dout.shape[2] // parts.shape[3], parts.shape[3])),
)
def _product_backward(dout: Tensor, parts: Tensor, probabilities: Tensor, dropped: Tensor | None, *rest: Any) -> Tensor:
    """dqkv (B, S, 3, N, D), from dout (B, S, H), the parts of `_heads_first` and probabilities (B * N, S, S)."""
    seed, p, site = rest
    batch, size = dout.shape[0], parts.shape[3]
    q, k, v = parts.unbind()
    mask = keep_mask(probabilities.shape, p, seed, site)
    if dropped is None:
        dropped = probabilities * mask
    dcontext = dout.unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1)
    dparts = torch.empty_like(parts)
    _bmm(dropped.transpose(1, 2), dcontext, keep_scale(p), out=dparts[2])
    dprobabilities = _bmm(dcontext, v.transpose(1, 2), keep_scale(p)).mul_(mask)
    dscores = torch._softmax_backward_data(dprobabilities, probabilities, -1, probabilities.dtype)
    _bmm(dscores, k, 1 / math.sqrt(size), out=dparts[0])
    _bmm(dscores.transpose(1, 2), q, 1 / math.sqrt(size), out=dparts[1])
    return dparts.unflatten(1, (batch, dout.shape[2] // size)).permute(1, 3, 0, 2, 4).contiguous()


class AttentionWithDropout(torch.autograd.Function):
    """softmax(q k' / sqrt(D) + bias), dropout, times v; the mask is drawn again in backward.

    rows: None, or those of a packed batch, which is padded within forward and within backward, so that what is kept of qkv
    is packed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        seed: Tensor,
        dropout: tuple[float, int],
        recompute: "Recompute",
    ) -> Tensor:
        keeps_dropped = recompute == "nothing"
        out, parts, probabilities, dropped = _product_forward(qkv, bias, rows, seed, *dropout, keeps_dropped)
        kept = (None, None, bias) if recompute == "core" else (probabilities, dropped if keeps_dropped else None, None)
        ctx.save_for_backward(parts if rows is None else qkv, *kept, rows, seed)
        ctx.heads, ctx.dropout = qkv.shape[-2], dropout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        parts, probabilities, dropped, bias, rows, seed = ctx.saved_tensors
        if rows is not None:
            scores = bias if probabilities is None else probabilities.unflatten(0, (-1, ctx.heads))
            parts, dout = _heads_first(padded(parts, rows, scores)), padded(dout, rows, scores)
        if probabilities is None:
            probabilities = _probabilities(parts, bias, ctx.heads)
        dqkv = _product_backward(dout, parts, probabilities, dropped, seed, *ctx.dropout)
        return unpadded(dqkv, rows), None, None, None, None, None
