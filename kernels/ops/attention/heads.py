"""The heads of a QKV projection: which columns are whose, and all of a head side by side, turned by rotary embedding."""

from collections.abc import Sequence
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


def _fake_heads_first(qkv: Tensor, rotary: Tensor | None, key_heads: int | None) -> tuple[Tensor, ...]:
    wholes = query_key_value(qkv, key_heads)
    return tuple(qkv.new_empty((len(x) * x.shape[2], x.shape[1], x.shape[3])) for x in wholes)


@operator(
    "attention_heads_first(Tensor qkv, Tensor? rotary, int? key_heads) -> (Tensor, Tensor, Tensor)", _fake_heads_first
)
def heads_first(qkv: Tensor, rotary: Tensor | None, key_heads: int | None) -> tuple[Tensor, ...]:
    """Return queries (B * N, S, D), keys and values (B * G, S, D), contiguous, in one pass.

    qkv: (B, S, 3, N, D), or (B, S, N + 2G, D) with key_heads = G. rotary: turns queries and keys.
    """
    parts = []
    for whole, angles in zip(query_key_value(qkv, key_heads), (rotary, rotary, None), strict=True):
        heads = whole.transpose(1, 2)
        part = heads.new_empty(heads.shape)
        _copy(heads, part, angles)
        parts.append(part.flatten(0, 1))
    return tuple(parts)


def _empty_qkv(like: Tensor, shape: Sequence[int], key_heads: int | None) -> Tensor:
    batch, length, heads, size = shape  # of queries
    middle = (3, heads) if key_heads is None else (heads + 2 * key_heads,)
    return like.new_empty((batch, length, *middle, size))


@operator(
    "attention_heads_last(Tensor q, Tensor k, Tensor v, Tensor? rotary, int? key_heads, SymInt batch, int heads) -> Tensor",
    lambda q, k, v, rotary, key_heads, batch, heads: _empty_qkv(q, (batch, q.shape[1], heads, q.shape[2]), key_heads),
)
def heads_last(
    q: Tensor, k: Tensor, v: Tensor, rotary: Tensor | None, key_heads: int | None, batch: int, heads: int
) -> Tensor:
    """Return the gradient of qkv, contiguous, of those of what `heads_first` gave; heads: N."""
    qkv = _empty_qkv(q, (batch, q.shape[1], heads, q.shape[2]), key_heads)
    for whole, part, angles in zip(query_key_value(qkv, key_heads), (q, k, v), (rotary, rotary, None), strict=True):
        _copy(part.unflatten(0, (batch, whole.shape[2])), whole.transpose(1, 2), angles, back=True)
    return qkv


def _copy(x: Tensor, out: Tensor, rotary: Tensor | None, *, back: bool = False) -> None:
    """Write x to out, (B, heads, S, D) both."""
    if rotary is None:
        out.copy_(x)
    else:
        turn(x, rotary, out, back=back)


@operator(
    "attention_turned_heads(Tensor qkv, Tensor rotary, int? key_heads) -> (Tensor, Tensor, Tensor)",
    lambda qkv, rotary, key_heads: tuple(x.new_empty(x.shape) for x in query_key_value(qkv, key_heads)),
)
def _turned_heads(qkv: Tensor, rotary: Tensor, key_heads: int | None) -> tuple[Tensor, ...]:
    """Return queries (B, S, N, D), keys and values (B, S, G, D), contiguous, in one pass; qkv as in `heads_first`."""
    wholes = query_key_value(qkv, key_heads)
    parts = tuple(whole.new_empty(whole.shape) for whole in wholes)
    for whole, part, angles in zip(wholes, parts, (rotary, rotary, None), strict=True):
        _copy(whole.transpose(1, 2), part.transpose(1, 2), angles)
    return parts


@operator(
    "attention_turned_back(Tensor dq, Tensor dk, Tensor dv, Tensor rotary, int? key_heads) -> Tensor",
    lambda dq, dk, dv, rotary, key_heads: _empty_qkv(dq, dq.shape, key_heads),
)
def _turned_back(dq: Tensor, dk: Tensor, dv: Tensor, rotary: Tensor, key_heads: int | None) -> Tensor:
    """Return the gradient of qkv, contiguous, of those of what `_turned_heads` gave."""
    dqkv = _empty_qkv(dq, dq.shape, key_heads)
    for whole, part, angles in zip(query_key_value(dqkv, key_heads), (dq, dk, dv), (rotary, rotary, None), strict=True):
        _copy(part.transpose(1, 2), whole.transpose(1, 2), angles, back=True)
    return dqkv


class TurnedHeads(torch.autograd.Function):
    """Queries, keys and values with rotary embedding, in the order of memory in which attention's output is then made."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, rotary: Tensor, key_heads: int | None) -> tuple[Tensor, ...]:
        ctx.save_for_backward(rotary)
        ctx.key_heads = key_heads
        return _turned_heads(qkv, rotary, key_heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        (rotary,) = ctx.saved_tensors
        return _turned_back(dq, dk, dv, rotary, ctx.key_heads), None, None
