"""The heads of a QKV projection: which columns are whose, and all of a head side by side, turned by rotary embedding."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..operator import operator
from .rotary import turn


def query_key_value(qkv: Tensor, key_heads: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return views (..., N, D), (..., G, D), (..., G, D) of qkv (..., 3, N, D), or (..., N + 2G, D) with key_heads = G."""
    if key_heads is None:
        q, k, v = qkv.unbind(-3)
    else:
        q, k, v = qkv.split([qkv.shape[-2] - 2 * key_heads, key_heads, key_heads], -2)
    return q, k, v


def split_heads(parts: Tensor, batch: int, key_heads: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries (B * N, S, D), keys and values (B * G, S, D) of what `heads_first` gives."""
    keys = parts.shape[0] // 3 if key_heads is None else batch * key_heads
    queries = parts.shape[0] - 2 * keys
    # by narrow, as an export may not write to what split gives
    return parts.narrow(0, 0, queries), parts.narrow(0, queries, keys), parts.narrow(0, queries + keys, keys)


@operator(
    "attention_heads_first(Tensor qkv, Tensor? rotary, int? key_heads) -> Tensor",
    lambda qkv, *_: qkv.new_empty((qkv.shape[0] * math.prod(qkv.shape[2:-1]), qkv.shape[1], qkv.shape[-1])),
)
def heads_first(qkv: Tensor, rotary: Tensor | None, key_heads: int | None) -> Tensor:
    """Return (B * (N + 2G), S, D), contiguous: of all sequences the queries, then keys, then values; in one pass.

    qkv: (B, S, 3, N, D), or (B, S, N + 2G, D) with key_heads = G. rotary: turns queries and keys.
    """
    batch, length = qkv.shape[:2]
    parts = qkv.new_empty((batch * math.prod(qkv.shape[2:-1]), length, qkv.shape[-1]))
    _copy(query_key_value(qkv, key_heads), split_heads(parts, batch, key_heads), rotary)
    return parts


def _empty_like_qkv(parts: Tensor, rotary: Tensor | None, key_heads: int | None, batch: int, heads: int) -> Tensor:
    middle = (3, heads) if key_heads is None else (heads + 2 * key_heads,)
    return parts.new_empty((batch, parts.shape[1], *middle, parts.shape[2]))


@operator(
    "attention_heads_last(Tensor parts, Tensor? rotary, int? key_heads, SymInt batch, int heads) -> Tensor",
    _empty_like_qkv,
)
def heads_last(parts: Tensor, rotary: Tensor | None, key_heads: int | None, batch: int, heads: int) -> Tensor:
    """Return the gradient of qkv, contiguous, of that of `heads_first`; heads: N."""
    qkv = _empty_like_qkv(parts, rotary, key_heads, batch, heads)
    _copy(query_key_value(qkv, key_heads), split_heads(parts, batch, key_heads), rotary, back=True)
    return qkv


def _copy(wholes: tuple[Tensor, ...], parts: tuple[Tensor, ...], rotary: Tensor | None, *, back: bool = False) -> None:
    """Write wholes (B, S, heads, D) to parts (B * heads, S, D), or with back=True the other way."""
    for whole, part, angles in zip(wholes, parts, (rotary, rotary, None), strict=True):
        pair = whole.transpose(1, 2), part.unflatten(0, (whole.shape[0], whole.shape[2]))
        source, target = pair[::-1] if back else pair
        if angles is None:
            target.copy_(source)
        else:
            turn(source, angles, target, back=back)


class HeadsFirst(torch.autograd.Function):
    """`heads_first` with its gradient."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, rotary: Tensor | None, key_heads: int | None) -> Tensor:
        ctx.save_for_backward(rotary)
        ctx.sizes = key_heads, qkv.shape[0], query_key_value(qkv, key_heads)[0].shape[-2]
        return heads_first(qkv, rotary, key_heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dparts: Tensor) -> tuple[Tensor | None, ...]:
        return heads_last(dparts, *ctx.saved_tensors, *ctx.sizes), None, None
