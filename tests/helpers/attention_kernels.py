"""The attention kernels called and checked: their masks, the mask that they draw, and the explicit formula under both."""

import math

import torch
import triton
import triton.language as tl

from xformer_train.kernels.ops.attention.attention_backward_triton import backward
from xformer_train.kernels.ops.attention.attention_dropout_triton import drop, drop_transposed, dropout_key
from xformer_train.kernels.ops.attention.attention_triton import Options, forward
from xformer_train.kernels.ops.dropout import drop_threshold

from .exactness import allowed_error

SITE = 1


def seed():
    return torch.tensor(2**62 + 987654321)


@triton.jit(do_not_specialize=["site", "threshold"])
def _mask_kernel(
    mask_ptr, seed_ptr, site, threshold, size, Q: tl.constexpr, K: tl.constexpr, TRANSPOSED: tl.constexpr
):  # mask: (streams, size, size) fp32 out, size a multiple of Q and K; grid (query tiles, key tiles, streams)
    query_start, key_start, stream = tl.program_id(0) * Q, tl.program_id(1) * K, tl.program_id(2)
    key, salt = dropout_key(seed_ptr, site, stream)
    place = (
        stream * size * size + (query_start + tl.arange(0, Q))[:, None] * size + key_start + tl.arange(0, K)[None, :]
    )
    if TRANSPOSED:
        ones = tl.full((K, Q), 1.0, tl.float32)
        tl.store(mask_ptr + tl.trans(place), drop_transposed(ones, key, salt, query_start, key_start, threshold))
    else:
        ones = tl.full((Q, K), 1.0, tl.float32)
        tl.store(mask_ptr + place, drop(ones, key, salt, query_start, key_start, threshold))


def draw_mask(streams, size, p, site=SITE, tile=(128, 128), transposed=False):
    """(streams, size, size) fp32 of 1 and 0; the stream of a head is sequence * N + head."""
    padded = math.ceil(size / 128) * 128
    mask = torch.empty(streams, padded, padded)
    grid = (padded // tile[0], padded // tile[1], streams)
    _mask_kernel[grid](mask, seed(), site, drop_threshold(p), padded, *tile, transposed)
    return mask[:, :size, :size]


def turned(x, rotary):
    """x (B, S, N, D) turned by the angles of its places; computed in fp32 where the dtype is narrower."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = rotary[: x.shape[1], None].to(wide).chunk(2, -1)
    x0, x1 = x.to(wide).chunk(2, -1)
    return torch.cat([x0 * cos - x1 * sin, x1 * cos + x0 * sin], -1).to(x.dtype)


def explicit_attention(qkv, visible, bias, mask, scale, key_heads=None, rotary=None):
    """(B, S, N * D); rows without a visible key are 0."""
    if key_heads is None:
        q, k, v = qkv.unbind(2)
    else:
        q, *keys_and_values = qkv.split([qkv.shape[2] - 2 * key_heads, key_heads, key_heads], 2)
        k, v = (part.repeat_interleave(q.shape[2] // key_heads, 2) for part in keys_and_values)
    if rotary is not None:
        q, k = turned(q, rotary), turned(k, rotary)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]) + bias[:, None, None].to(q.dtype)
    scores = scores.masked_fill(~visible, -math.inf)
    seen = visible.any(-1, keepdim=True).expand(*scores.shape[:3], 1)
    weights = torch.softmax(scores.masked_fill(~seen, 0.0), -1) * seen
    return ((weights * mask.to(qkv.dtype) * scale) @ v).transpose(1, 2).flatten(2)


def with_gradient(qkv, dout, *arguments):
    qkv = qkv.clone().requires_grad_()
    out = explicit_attention(qkv, *arguments)
    return out.detach(), torch.autograd.grad(out, qkv, dout)[0]


def assert_as_exact_as_torch(ours, same_dtype, exact):
    """With one key torch makes no error, and fp32 may still round once."""
    error, allowed = (
        (ours.double() - exact).norm(),
        allowed_error(same_dtype, exact, eps=torch.finfo(torch.float32).eps),
    )
    assert error <= allowed, (error / exact.norm(), allowed / exact.norm())


def visible_keys(batch, size, lengths=None, key_mask=None, segment_ids=None, causal=False, window=None):
    """(B, 1, S, S) bool."""
    visible = torch.ones(batch, 1, size, size, dtype=torch.bool)
    if window is not None:
        visible &= (torch.arange(size)[:, None] - torch.arange(size)).abs() <= window
    if lengths is not None:
        visible &= (torch.arange(size) < lengths[:, None])[:, None, None]
    if key_mask is not None:
        visible &= key_mask[:, None, None]
    if segment_ids is not None:
        visible &= (segment_ids[:, :, None] == segment_ids[:, None])[:, None]
    return visible.tril() if causal else visible


def masks_of(kind, batch, size):
    """Keyword arguments of the launch functions."""
    torch.manual_seed(size)
    masks = {"causal": kind.startswith("causal")}
    if "lengths" in kind:
        masks["lengths"] = torch.tensor([size // 2, 0, 1, size])[:batch].int()
    if "key_mask" in kind:
        masks["key_mask"] = torch.rand(batch, size) > 0.3
    if "segments" in kind:
        masks["segment_ids"] = (torch.rand(batch, size) < 0.1).int().cumsum(1, dtype=torch.int32)
    if "bias" in kind:
        bias = (3 * torch.randn(batch, size)).masked_fill(torch.rand(batch, size) < 0.3, -1e4)
        masks["key_bias"] = bias.bfloat16().float()  # so that the reference adds the same values at every dtype
    return masks


def run(dout, qkv, *, tiles=None, **options):
    options = Options(**options)
    out, lse = forward(qkv, options, tiles)
    return out, backward(dout, qkv, out, lse, options, tiles=tiles)
