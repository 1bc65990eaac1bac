"""Which query sees which key, by Transformer Engine's names, and attention between the projections.

Self-attention is kernels/ops/attention/attention.py's. Queries over more keys, those of another stream or of a cache, are here.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers.recomputation import recompute_in_backward
from ..ops.attention.attention import AttentionMask, attention
from ..ops.attention.cached_attention import cached_attention
from ..ops.attention.hiding_bias import hiding_bias
from ..ops.dropout import keep_mask, keep_scale

MaskType = Literal["no_mask", "padding", "causal", "padding_causal", "arbitrary"]


def check_mask_type(name: str, value: str) -> None:
    """Raise ValueError for an unknown mask type; name: of the argument."""
    if value not in get_args(MaskType):
        raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(get_args(MaskType))}")


@dataclass(frozen=True)
class Visibility:
    """What a forward pass's queries see.

    mask: for ops/attention; its bias alone where keys are of another stream or in a cache. blind: (B or 1, Sq or 1)
    bool, True where a query sees no key; None where every one sees some.
    """

    mask: AttentionMask
    blind: Tensor | None = None


def check_attention_mask(mask: Tensor, mask_type: str, sizes: tuple[int, int, int]) -> Tensor:
    """Return a bool mask (B or 1, 1, Sq or 1, Sk) or (Sq or 1, Sk) with four dims; raises ValueError for any other.

    sizes: B, Sq, Sk.
    """
    given, mask = mask.shape, mask[None, None] if mask.ndim == 2 else mask
    batch, queries, keys = sizes
    if mask_type == "no_mask":
        raise ValueError("attention_mask is given but the mask type is 'no_mask'; use 'arbitrary' or 'padding'")
    if mask.dtype != torch.bool:
        raise ValueError(f"attention_mask is {mask.dtype}; it must be bool, True where a key is hidden")
    legal = ((1, batch), (1,), (1, queries), (keys,))
    if mask.ndim != 4 or any(size not in allowed for size, allowed in zip(mask.shape, legal, strict=True)):
        raise ValueError(
            f"attention_mask is {tuple(given)}; it must be (B or 1, 1, Sq or 1, Sk) or (Sq or 1, Sk) with B={batch}, "
            f"Sq={queries}, Sk={keys}"
        )
    return mask


def visibility(mask: Tensor | None, mask_type: str, sizes: tuple[int, int, int], like: Tensor) -> Visibility:
    """Return what queries see of their own stream under a mask that is True where a key is hidden; sizes: B, Sq, Sk.

    The queries are the last Sq of Sk positions; where there are more, those before are in a cache. like: gives dtype and
    device. A mask and a causal order hold together. Raises ValueError for a mask that does not fit.
    """
    causal, (batch, queries, keys) = "causal" in mask_type, sizes
    if mask is None:
        if mask_type == "arbitrary":
            raise ValueError("the mask type is 'arbitrary' but attention_mask is None; give one, or use 'no_mask'")
        if queries in (1, keys) or not causal:
            return Visibility(AttentionMask(causal=causal and queries == keys))
    else:
        mask = check_attention_mask(mask, mask_type, sizes)
        if mask.shape[2] == 1 and mask.shape[0] == batch and queries == keys:
            seen = ~mask[:, 0, 0]
            some = seen.cumsum(1) > 0 if causal else seen.any(1, keepdim=True)
            return Visibility(AttentionMask(causal=causal, key_mask=seen), ~some)
    seen = torch.ones((1, 1, queries, keys), dtype=torch.bool, device=like.device) if mask is None else ~mask
    if causal:
        seen = seen & torch.ones((queries, keys), dtype=torch.bool, device=like.device).tril(keys - queries)
    return _by_bias(seen, like)


def cross_visibility(mask: Tensor | None, mask_type: str, sizes: tuple[int, int, int], like: Tensor) -> Visibility:
    """Return what queries see of another stream; arguments and errors as in `visibility`, and ValueError for a causal order."""
    if "causal" in mask_type:
        raise ValueError(
            f"enc_dec_attn_mask_type={mask_type!r} orders tokens of two streams; use 'padding' or 'arbitrary'"
        )
    if mask is None:
        return visibility(None, mask_type, sizes, like)
    return _by_bias(~check_attention_mask(mask, mask_type, sizes), like)


def _by_bias(seen: Tensor, like: Tensor) -> Visibility:
    return Visibility(AttentionMask(bias=hiding_bias(seen, like.dtype)), ~seen.any(-1)[:, 0])


@dataclass(frozen=True)
class Dropping:
    """Dropout of attention probabilities. seed: int64 of shape (), None for none."""

    p: float
    seed: Tensor | None
    site: int


def self_attention(qkv: Tensor, seen: Visibility, dropping: Dropping, *, recompute: bool, **options: Any) -> Tensor:
    """Return attention (B, S, N * D), or (T, N * D) for a packed batch, of qkv of any strides.

    qkv, options (key_heads, rotary): as kernels/ops/attention/attention.py takes them, with recompute for its `core`. A query
    that sees no key gives zeros and passes no gradient.
    """
    options["recompute"] = "core" if recompute else "nothing"
    return _seeing(attention(qkv, seen.mask, dropping.p, dropping.seed, dropping.site, **options), seen)


def attention_over_cache(q: Tensor, keys: Tensor, values: Tensor, seen: Visibility) -> Tensor:
    """Return (B, Sq, N * D) of q (B, Sq, N, D) and keys and values (B, Sk, G, D), see `cached_attention`."""
    return _seeing(cached_attention(q, keys, values, seen.mask.bias), seen)


def cross_attention(q: Tensor, kv: Tensor, seen: Visibility, dropping: Dropping, *, recompute: bool) -> Tensor:
    """Return (B, Sq, N * D) of q (B, Sq, N, D) and kv (B, Sk, 2, N, D); the rest as in `self_attention`."""
    call = functools.partial(_cross_attention, bias=seen.mask.bias, dropping=dropping)
    return _seeing(recompute_in_backward(call, q, kv) if recompute else call(q, kv), seen)


def _cross_attention(q: Tensor, kv: Tensor, bias: Tensor | None, dropping: Dropping) -> Tensor:
    q, k, v = q.transpose(1, 2), *(part.transpose(1, 2) for part in kv.unbind(2))
    if dropping.seed is None or dropping.p == 0:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(2, 3)  # scaled first, for the range of fp16
    if bias is not None:
        scores = scores + bias
    probabilities = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
    kept = probabilities * keep_mask(probabilities.shape, dropping.p, dropping.seed, dropping.site)
    return (kept @ v * keep_scale(dropping.p)).transpose(1, 2).flatten(2)


def _seeing(context: Tensor, seen: Visibility) -> Tensor:
    return context if seen.blind is None else context.masked_fill(seen.blind[..., None], 0)
