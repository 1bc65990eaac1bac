"""Attention by products of matrices of scores, with its gradient: what CPUs run under dropout or a window, and tests compare.

Scores are whole matrices (S, S), or with a window those of `Blocks`.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dropout import keep_mask, keep_mask_of_block, keep_scale
from ..operator import operator, reused
from .blocks import window_blocks
from .heads import heads_first, heads_last

if TYPE_CHECKING:
    from .attention import Recompute


class Pattern(NamedTuple):
    """What is asked for besides tensors, in the order of the operators; batch and size: B and S, of a packed batch padded."""

    batch: int
    size: int
    heads: int  # N
    key_heads: int | None
    causal: bool  # for the borders of blocks; the bias hides keys
    window: int | None
    p: float
    site: int

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Yield the queries and the keys of each block."""
        if self.window is None:
            return iter([(slice(0, self.size), slice(0, self.size))])
        return window_blocks(self.size, self.window, self.causal).slices()

    def keep_mask(self, queries: slice, keys: slice, seed: Tensor | None) -> Tensor | None:
        """Return which scores of a block stay, (B * N, queries, keys); None without dropout."""
        if seed is None:
            return None
        shape = torch.Size((self.batch * self.heads, self.size, self.size))
        if self.window is None:
            return keep_mask(shape, self.p, seed, self.site)
        return keep_mask_of_block(shape, queries, keys, self.p, seed, self.site)


def padded(x: Tensor, rows: Tensor | None, batch: int, size: int) -> Tensor:
    """A tensor (T, ...) as (B, S, ...) with zeros at padding; x itself where rows is None, as it is padded then.

    rows: of `AttentionMask.rows_when_padded`.
    """
    if rows is None:
        return x
    return x.new_zeros((batch * size, *x.shape[1:])).index_copy_(0, rows, x).unflatten(0, (batch, size))


def unpadded(x: Tensor, rows: Tensor | None) -> Tensor:
    """The inverse of `padded`."""
    return x if rows is None else x.flatten(0, 1).index_select(0, rows)


def _bmm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * (a @ b) of (.., M, K) and (.., K, N), three dims each; the factor costs little inside the product."""
    if scale == 1:
        return torch.bmm(a, b)
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def _by_key_head(x: Tensor, keys: Tensor) -> Tensor:
    """x (B * N, M, ..) as (B * G, N / G * M, ..): the rows of all heads that share a head of keys (B * G, S, D)."""
    share = x.shape[0] // max(1, keys.shape[0])
    if share <= 1:  # also where there are no tokens
        return x
    groups = x.unflatten(0, (-1, share))
    if torch.compiler.is_exporting():
        return torch.cat(groups.unbind(1), 1)  # flatten would tie the export to some lengths
    return groups.flatten(1, 2)


def _by_head(x: Tensor, heads: int) -> Tensor:
    """The inverse of `_by_key_head`; heads: B * N."""
    share = heads // max(1, x.shape[0])
    return x if share <= 1 else x.unflatten(1, (share, -1)).flatten(0, 1)


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """q k' / sqrt(D) + bias, (B * N, queries, keys), of heads (B * N, queries, D) and (B * G, keys, D)."""
    scale = 1 / math.sqrt(q.shape[-1])
    # Added inside the product; an export would take the batch for a constant by these sizes.
    if not torch.compiler.is_exporting() and bias is not None and q.shape[0] == k.shape[0]:
        added = bias.expand(q.shape[0] // heads, heads, q.shape[1], k.shape[1]).flatten(0, 1)
        return torch.baddbmm(added, q, k.transpose(1, 2), alpha=scale)
    scores = _by_head(_bmm(_by_key_head(q, k), k.transpose(1, 2), scale), q.shape[0])
    if bias is not None:
        scores.unflatten(0, (-1, heads)).add_(bias)
    return scores


def _block_bias(bias: Tensor | None, index: int, queries: slice, pattern: Pattern) -> Tensor | None:
    """The bias of one block: `AttentionMask.additive` has a row of blocks where there is a window."""
    if bias is None or pattern.window is None:
        return bias
    return bias[index, :, :, : queries.stop - queries.start]


def _fake_forward(qkv: Tensor, bias: Tensor | None, rows: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    pattern, recompute = Pattern(*rest[2:-1]), rest[-1]
    tokens = qkv.shape[:2] if rows is None else qkv.shape[:1]
    out = qkv.new_empty((*tokens, pattern.heads * qkv.shape[-1]))
    keys = pattern.key_heads or pattern.heads
    heads = [pattern.batch * count for count in (pattern.heads, keys, keys)]
    parts = [qkv.new_empty((count, pattern.size, qkv.shape[-1])) for count in heads if rows is None]
    shapes = [(heads[0], query.stop - query.start, key.stop - key.start) for query, key in pattern.blocks()]
    kept = [
        [qkv.new_empty(shape) for shape in shapes if keeps] for keeps in (recompute != "core", recompute == "nothing")
    ]
    return out, parts, *kept


@operator(
    "attention_product_forward(Tensor qkv, Tensor? bias, Tensor? rows, Tensor? rotary, Tensor? seed, SymInt batch, "
    "SymInt size, int heads, int? key_heads, bool causal, int? window, float p, int site, str recompute) "
    "-> (Tensor, Tensor[], Tensor[], Tensor[])",
    _fake_forward,
)
def _product_forward(qkv: Tensor, bias: Tensor | None, rows: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    """The output; what `heads_first` gives, unless the batch is packed; of each block the probabilities, twice.

    First before dropout, then after it, without its factor, (B * N, queries, keys) each; as far as recompute does not leave
    them for backward to make.
    """
    rotary, seed, *numbers, recompute = rest
    pattern = Pattern(*numbers)
    q, k, v = heads_first(padded(qkv, rows, *pattern[:2]), rotary, pattern.key_heads)
    context = q.new_empty((*pattern[:3], q.shape[-1]))
    probabilities, dropped = [], []
    for index, (queries, keys) in enumerate(pattern.blocks()):
        scores = _scores(q[:, queries], k[:, keys], _block_bias(bias, index, queries, pattern), pattern.heads)
        block = torch.softmax(scores, -1)
        mask = pattern.keep_mask(queries, keys, seed)
        kept = block if mask is None else torch.mul(block, mask, out=reused(scores))
        out = _by_head(_bmm(_by_key_head(kept, k), v[:, keys], keep_scale(pattern.p)), q.shape[0])
        context[:, queries] = out.unflatten(0, pattern[0:3:2]).transpose(1, 2)
        if recompute != "core":
            probabilities.append(block)
        if recompute == "nothing":
            dropped.append(kept)
    return unpadded(context.flatten(2), rows), [q, k, v] if rows is None else [], probabilities, dropped


def _fake_backward(dout: Tensor, saved: Sequence[Tensor], probabilities: Any, dropped: Any, *rest: Any) -> Tensor:
    pattern, dim = Pattern(*rest[4:]), saved[0].shape[-1]
    middle = (3, pattern.heads) if pattern.key_heads is None else (pattern.heads + 2 * pattern.key_heads,)
    return dout.new_empty((*dout.shape[:-1], *middle, dim))


@operator(
    "attention_product_backward(Tensor dout, Tensor[] saved, Tensor[] probabilities, Tensor[] dropped, Tensor? bias, "
    "Tensor? rows, Tensor? rotary, Tensor? seed, SymInt batch, SymInt size, int heads, int? key_heads, bool causal, "
    "int? window, float p, int site) -> Tensor",
    _fake_backward,
)
def _product_backward(dout: Tensor, saved: Sequence[Tensor], probabilities: Any, dropped: Any, *rest: Any) -> Tensor:
    """dqkv, from dout (B, S, N * D) or (T, N * D) and what forward gave; saved: q, k, v, or qkv of a packed batch."""
    bias, rows, rotary, seed, *numbers = rest
    pattern = Pattern(*numbers)
    if rows is not None:
        saved = heads_first(padded(saved[0], rows, *pattern[:2]), rotary, pattern.key_heads)
        dout = padded(dout, rows, *pattern[:2])
    q, k, v = saved
    scale, keep = 1 / math.sqrt(q.shape[-1]), keep_scale(pattern.p)
    dcontext = dout.unflatten(2, (-1, q.shape[-1])).transpose(1, 2).flatten(0, 1)
    whole = pattern.window is None  # one block; else keys are in several
    dq, dk, dv = (torch.empty_like(part) if whole else torch.zeros_like(part) for part in (q, k, v))
    beta = 0 if whole else 1
    for index, (queries, keys) in enumerate(pattern.blocks()):
        q_block, k_block, v_block, dcontext_block = q[:, queries], k[:, keys], v[:, keys], dcontext[:, queries]
        if probabilities:
            block = probabilities[index]
        else:
            scores = _scores(q_block, k_block, _block_bias(bias, index, queries, pattern), pattern.heads)
            block = torch.softmax(scores, -1)
        mask = pattern.keep_mask(queries, keys, seed)
        kept = dropped[index] if dropped else block if mask is None else block * mask
        dcontext_block = _by_key_head(dcontext_block, k)
        dv[:, keys].baddbmm_(_by_key_head(kept, k).transpose(1, 2), dcontext_block, beta=beta, alpha=keep)
        dblock = _by_head(_bmm(dcontext_block, v_block.transpose(1, 2), keep), q.shape[0])
        if mask is not None:
            dblock.mul_(mask)
        dscores = _by_key_head(torch._softmax_backward_data(dblock, block, -1, block.dtype), k)
        dqueries = _by_head(_bmm(dscores, k_block, scale), q.shape[0])
        if whole:
            dq = dqueries
        else:
            dq[:, queries] = dqueries
        dk[:, keys].baddbmm_(dscores.transpose(1, 2), _by_key_head(q_block, k), beta=beta, alpha=scale)
    return unpadded(heads_last(dq, dk, dv, rotary, pattern.key_heads, pattern.batch, pattern.heads), rows)


class AttentionByProducts(torch.autograd.Function):
    """softmax(q k' / sqrt(D) + bias), dropout if there is a seed, times v; the mask is drawn again in backward.

    rows: None, or those of a packed batch, which is padded within forward and within backward, so that what is kept of qkv
    is packed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        rotary: Tensor | None,
        seed: Tensor | None,
        pattern: Pattern,
        recompute: "Recompute",
    ) -> Tensor:
        out, parts, probabilities, dropped = _product_forward(qkv, bias, rows, rotary, seed, *pattern, recompute)
        saved = parts if rows is None else [qkv]
        bias = bias if recompute == "core" else None
        ctx.save_for_backward(bias, rows, rotary, seed, *saved, *probabilities, *dropped)
        ctx.pattern, ctx.counts = pattern, (len(saved), len(probabilities), len(dropped))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        bias, rows, rotary, seed, *kept = ctx.saved_tensors
        remaining = iter(kept)
        lists = [list(itertools.islice(remaining, count)) for count in ctx.counts]
        dqkv = _product_backward(dout, *lists, bias, rows, rotary, seed, *ctx.pattern)
        return dqkv, None, None, None, None, None, None
