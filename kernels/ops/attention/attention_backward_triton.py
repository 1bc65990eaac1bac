"""GPU kernels of the backward pass of attention; the maths stands in attention_triton.py.

Sequences of up to 128 tokens with heads of up to 64 columns take one kernel with all keys of a sequence in one program,
which then has dQ as well (five products). Longer ones take two, one per tile of queries and one per tile of keys, and form
P and dS twice (seven products), so that nothing is added atomically and every run gives the same bits; or, `stochastic`,
again five in one kernel, with dQ added atomically.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dropout_triton import SEED
from .attention_dropout_triton import drop, drop_transposed
from .attention_tiles import Tiles
from .attention_triton import (
    LN_2,
    NUMBERS,
    Options,
    Strides,
    _hide,
    _key_range,
    _load,
    _load_bias,
    _offset,
    _start,
    _store,
    choose_tiles,
    sequence_grid,
    shared_arguments,
)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=SEED)
def attention_backward_queries(
    dout_ptr,  # (B, S, N * D) or (T, N * D)
    dout_strides,  # Strides, of batch and row
    qkv_ptr,  # (B, S, 3, N, D) or (T, 3, N, D)
    out_ptr,  # like dout, contiguous
    lse_ptr,  # (N, row_blocks * 16) fp32
    delta_ptr,  # like lse, out: rowsum(dO O) / r
    dqkv_ptr,  # like qkv, contiguous
    masks,
    strides,
    seed_ptr,
    size,
    row_blocks,
    score_scale,
    site,
    threshold,
    scale,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
):
    """dQ and delta of Q queries; the other arguments as in `attention_forward`; grid (query tiles, N, B)."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head, first, num_queries, num_keys, q_ptr, dropout, salt = _start(qkv_ptr, masks, strides, size, seed_ptr, site)
    query_start = tile * Q
    if query_start >= num_queries:
        return
    k_ptr = q_ptr + strides.part
    v_ptr = k_ptr + strides.part
    dout_ptr += _offset(first, masks, dout_strides) + head * D
    query = query_start + tl.arange(0, Q)
    hidden = tl.num_programs(1) * D
    row = head.to(tl.int64) * (row_blocks * 16) + first + query

    q = _load(q_ptr, strides.row, query_start, num_queries, Q, D, D_PADDED)
    dout = _load(dout_ptr, dout_strides.row, query_start, num_queries, Q, D, D_PADDED)
    out = _load(out_ptr + first * hidden + head * D, hidden, query_start, num_queries, Q, D, D_PADDED)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1) / scale
    tl.store(delta_ptr + row, delta, mask=query < num_queries)
    lse = tl.load(lse_ptr + row, mask=query < num_queries, other=float("inf"))

    full, end = _key_range(query_start, num_keys, masks, CAUSAL, Q, K)
    dq = tl.zeros((Q, D_PADDED), tl.float32)
    for masked in tl.static_range(2):
        for key_start in range(full if masked else 0, end if masked else full, K):
            k = _load(k_ptr, strides.row, key_start, num_keys, K, D, D_PADDED)
            v = _load(v_ptr, strides.row, key_start, num_keys, K, D, D_PADDED)
            scores = tl.dot(q, tl.trans(k), input_precision="tf32x3")
            if masked:
                key = key_start + tl.arange(0, K)[None, :]
                if masks.key_bias is not None:
                    scores += _load_bias(masks, key, num_keys, first, score_scale)
                scores = _hide(scores, query[:, None], key, num_queries, num_keys, first, masks, CAUSAL)
            p = tl.math.exp2(scores * score_scale - lse[:, None])
            dp = tl.dot(dout, tl.trans(v), input_precision="tf32x3")
            if seed_ptr is not None:
                dp = drop(dp, dropout, salt, query_start, key_start, threshold)
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="tf32x3")
    dq = dq * (score_scale * scale * LN_2)
    _store(dqkv_ptr + first * (3 * hidden) + head * D, 3 * hidden, query_start, num_queries, dq, D)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=SEED)
def attention_backward_keys(
    dout_ptr,
    dout_strides,
    qkv_ptr,
    out_ptr,  # read with dQ
    lse_ptr,
    delta_ptr,  # from attention_backward_queries, read without dQ
    dq_sum_ptr,  # (B * S, N, D) or (T, N, D) fp32, zeros, out: dQ; None: dQ goes to dqkv
    dqkv_ptr,
    masks,
    strides,
    seed_ptr,
    size,
    row_blocks,
    score_scale,
    site,
    threshold,
    scale,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    WITH_DQ: tl.constexpr,
):
    """dK and dV of K keys; arguments as in `attention_backward_queries`; grid (key tiles, N, B).

    WITH_DQ: dQ too, written when these are all keys of their sequence, else added to that of the other programs.
    Scores are held as (K, Q), so that P and dS go from the registers of one product straight into the next.
    """
    head, first, num_queries, num_keys, q_ptr, dropout, salt = _start(qkv_ptr, masks, strides, size, seed_ptr, site)
    key_start = tl.program_id(0) * K
    if key_start >= num_queries:
        return
    hidden = tl.num_programs(1) * D
    k_ptr = q_ptr + strides.part
    dout_ptr += _offset(first, masks, dout_strides) + head * D
    dq_ptr = dqkv_ptr + first * (3 * hidden) + head * D
    lse_row = head.to(tl.int64) * (row_blocks * 16) + first
    key = key_start + tl.arange(0, K)[:, None]
    gradient_scale = score_scale * scale * LN_2

    begin = key_start // Q * Q if CAUSAL else 0
    # a sequence without keys has a dQ too, zeros
    end = num_queries if WITH_DQ or key_start < num_keys else begin
    k = _load(k_ptr, strides.row, key_start, num_keys, K, D, D_PADDED)
    v = _load(k_ptr + strides.part, strides.row, key_start, num_keys, K, D, D_PADDED)
    bias = _load_bias(masks, key, num_keys, first, score_scale) if masks.key_bias is not None else 0.0
    dk = tl.zeros((K, D_PADDED), tl.float32)
    dv = tl.zeros((K, D_PADDED), tl.float32)
    for query_start in range(begin, end, Q):
        query = query_start + tl.arange(0, Q)
        q = _load(q_ptr, strides.row, query_start, num_queries, Q, D, D_PADDED)
        dout = _load(dout_ptr, dout_strides.row, query_start, num_queries, Q, D, D_PADDED)
        lse = tl.load(lse_ptr + lse_row + query, mask=query < num_queries, other=float("inf"))
        if WITH_DQ:
            out = _load(out_ptr + first * hidden + head * D, hidden, query_start, num_queries, Q, D, D_PADDED)
            delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1) / scale
        else:
            delta = tl.load(delta_ptr + lse_row + query, mask=query < num_queries, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision="tf32x3")
        if masks.key_bias is not None:
            scores += bias
        # A mask of keys alone is needed for dQ only: a key that nobody sees spoils but its own dK and dV, set to 0 below.
        if WITH_DQ or CAUSAL or masks.segment_ids is not None:
            scores = _hide(scores, query[None, :], key, num_queries, num_keys, first, masks, CAUSAL)
        p = tl.math.exp2(scores * score_scale - lse[None, :])
        kept = p
        if seed_ptr is not None:
            kept = drop_transposed(p, dropout, salt, query_start, key_start, threshold)
        dv = tl.dot(kept.to(dout.dtype), dout, dv, input_precision="tf32x3")
        dp = tl.dot(v, tl.trans(dout), input_precision="tf32x3")
        if seed_ptr is not None:
            ds = kept * dp - p * delta[None, :]  # P M dP - P delta: what was dropped need not be dropped again
        else:
            ds = p * (dp - delta[None, :])
        ds = ds.to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision="tf32x3")
        if WITH_DQ:
            # (D, Q), because wgmma takes no fewer than 64 rows
            dq = tl.dot(tl.trans(k), ds, input_precision="tf32x3") * gradient_scale
            if dq_sum_ptr is not None:
                column = tl.arange(0, D_PADDED)[:, None]
                place = dq_sum_ptr + (first + query)[None, :] * hidden + head * D + column
                tl.atomic_add(place, dq, mask=(query < num_queries)[None, :] & (column < D), sem="relaxed")
            else:
                _store(dq_ptr, 3 * hidden, query_start, num_queries, tl.trans(dq), D)

    seen = key < num_keys
    if masks.key_mask is not None:
        seen = seen & (tl.load(masks.key_mask + first + key, mask=seen, other=0) != 0)
    dk_ptr = dq_ptr + hidden
    _store(dk_ptr, 3 * hidden, key_start, num_queries, tl.where(seen, dk * gradient_scale, 0.0), D)
    _store(dk_ptr + hidden, 3 * hidden, key_start, num_queries, tl.where(seen, dv * scale, 0.0), D)


def backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
    *,
    stochastic: bool = False,
    tiles: Tiles | None = None,
) -> Tensor:
    """dqkv, contiguous, in shape and dtype of qkv; 0 for keys that no query sees and queries that see no key.

    dout: (B, S, N * D) or (T, N * D), any strides; out, lse: from `forward`; the others as there.
    stochastic: add dQ atomically, in an order that changes from run to run and with it the last bits of dQ. It makes no
        difference for up to 128 tokens, for heads of more than 64 columns and for fp32; nor without dropout, where the
        additions take more instructions than forming P twice.
    """
    length, num_heads, num_sequences = sequence_grid(qkv, options)
    shared = shared_arguments(qkv, options)
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    given = dout, Strides(0 if options.cu_seqlens is not None else dout.stride(0), dout.stride(-2)), qkv
    dqkv = qkv.new_empty(qkv.shape)
    rows, keys = (tiles or choose_tiles(qkv, length, options))[1:]
    grid = (triton.cdiv(length, keys.keys), num_heads, num_sequences)

    def run_keys(out: Tensor | None, delta: Tensor | None, dq_sum: Tensor | None) -> None:
        tile = keys.queries, keys.keys, delta is None
        attention_backward_keys[grid](*given, out, lse, delta, dq_sum, dqkv, *shared, *tile, **keys.options())

    if rows is None:
        run_keys(out, None, None)
    elif stochastic and options.drops and qkv.shape[-1] <= 64 and qkv.dtype != torch.float32:
        dq = torch.zeros_like(out, dtype=torch.float32)
        run_keys(out, None, dq)
        dqkv.select(-3, 0).copy_(dq.unflatten(-1, qkv.shape[-2:]))
    else:
        delta = torch.empty_like(lse)
        attention_backward_queries[(triton.cdiv(length, rows.queries), num_heads, num_sequences)](
            *given, out, lse, delta, dqkv, *shared, rows.queries, rows.keys, **rows.options()
        )
        run_keys(None, delta, None)
    return dqkv
