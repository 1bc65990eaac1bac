"""Attention of new tokens over the keys and values of earlier ones and their own, where text is generated token by token."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .hiding_bias import hiding_bias


def cached_attention(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """Return (B, Sq, N * D) of q (B, Sq, N, D) and keys and values (B, Sk, G, D), each for N / G heads in order; no dropout.

    bias: (B or 1, 1, Sq or 1, Sk), added to the scaled scores, in their dtype.
    """
    batch, queries, heads, size = q.shape
    groups = keys.shape[2]
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    if queries == 1:  # the heads that share keys are rows of one product
        q = q.reshape(batch, groups, heads // groups, size)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=bias).reshape(batch, 1, heads * size)
    shared = heads != groups
    context = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=bias, enable_gqa=shared)
    return context.transpose(1, 2).flatten(2)


def cached_bias(
    queries: range, key_mask: Tensor | None, first: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """Return the bias of `cached_attention` for causal queries at these positions over keys from `first` on, None for none.

    key_mask: (B or 1, end of the queries) bool, True at tokens; None: all are. window: as in `attention`; the keys of a single
    query begin inside of it.
    """
    if len(queries) == 1:
        return None if key_mask is None else hiding_bias(key_mask[:, None, None, first:], dtype)
    places = torch.arange(first, queries.stop, device=device)
    at = places[queries.start - first :, None]
    seen = places <= at
    if window is not None:
        seen = seen & (at - places <= window)
    seen = seen[None, None]
    return hiding_bias(seen if key_mask is None else seen & key_mask[:, None, None, first:], dtype)
