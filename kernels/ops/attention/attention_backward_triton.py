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
from .attention_dropout_triton import drop, drop_transposed, dropout_key
from .attention_rows_triton import load_rows, load_turned, store_rows, store_turned_back
from .attention_tiles import Tiles
from .attention_triton import (
    LN_2,
    NUMBERS,
    Options,
    Strides,
    _head,
    _hide,
    _is_key,
    _key_tiles,
    _load_bias,
    _masked_tile,
    _offset,
    _sequence,
    choose_tiles,
    heads,
    sequence_grid,
    shared_arguments,
)


@triton.jit
def _delta(dout, out, scale):
    """rowsum(dO O) / r."""
    return tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1) / scale


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=SEED)
def attention_backward_queries(
    dout_ptr,  # (B, S, N * D) or (T, N * D)
    dout_strides,  # Strides, of batch and row
    qkv_ptr,
    out_ptr,  # like dout, contiguous
    lse_ptr,  # (N, row_blocks * 16) fp32
    delta_ptr,  # like lse, out: rowsum(dO O) / r
    dqkv_ptr,  # like qkv, contiguous
    masks,
    strides,
    rotary_ptr,
    seed_ptr,
    size,
    row_blocks,
    score_scale,
    site,
    threshold,
    scale,
    CAUSAL: tl.constexpr,
    SHARE: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
):
    """dQ and delta of Q queries; the other arguments as in `attention_forward`; grid (query tiles, N, B)."""
    query_start = (tl.num_programs(0) - 1 - tl.program_id(0)) * Q
    head = tl.program_id(1)
    first, num_queries, num_keys = _sequence(masks, size)
    q_ptr, k_ptr, v_ptr = _head(qkv_ptr + _offset(first, masks, strides), strides, head, SHARE)
    dropout, salt = dropout_key(seed_ptr, site, tl.program_id(2) * tl.num_programs(1) + head)
    if query_start >= num_queries:
        return
    dout_ptr += _offset(first, masks, dout_strides) + head * D
    query = query_start + tl.arange(0, Q)
    hidden = tl.num_programs(1) * D
    row = head.to(tl.int64) * (row_blocks * 16) + first + query

    q = load_turned(q_ptr, strides.row, rotary_ptr, query_start, num_queries, Q, D, D_PADDED)
    dout = load_rows(dout_ptr, dout_strides.row, query_start, num_queries, Q, D, D_PADDED)
    out = load_rows(out_ptr + first * hidden + head * D, hidden, query_start, num_queries, Q, D, D_PADDED)
    delta = _delta(dout, out, scale)
    tl.store(delta_ptr + row, delta, mask=query < num_queries)
    lse = tl.load(lse_ptr + row, mask=query < num_queries, other=float("inf"))

    full, rest, begin, end = _key_tiles(query_start, num_keys, masks, CAUSAL, Q, K)
    dq = tl.zeros((Q, D_PADDED), tl.float32)
    for masked in tl.static_range(2):
        for tile in range(begin if masked else full, end if masked else rest, K):
            key_start = _masked_tile(tile, full, rest, masks) if masked else tile
            k = load_turned(k_ptr, strides.row, rotary_ptr, key_start, num_keys, K, D, D_PADDED)
            v = load_rows(v_ptr, strides.row, key_start, num_keys, K, D, D_PADDED)
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
    width = (SHARE + 2) * (tl.num_programs(1) // SHARE) * D
    dq_ptr = dqkv_ptr + first * width + head * D
    store_turned_back(dq_ptr, width, rotary_ptr, query_start, num_queries, dq, D)


@triton.jit
def _queries_of_keys(
    key_start,
    num_queries,
    num_keys,
    masks,
    CAUSAL: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    WITH_DQ: tl.constexpr,
):
    """(begin, end): the queries that may see keys key_start .. key_start + K."""
    begin = key_start // Q * Q if CAUSAL else 0
    # a sequence without keys has a dQ too, zeros
    end = num_queries if WITH_DQ or key_start < num_keys else begin
    if masks.window is not None:
        end = tl.minimum(end, key_start + K + masks.window)
        if not CAUSAL:
            begin = tl.maximum(key_start - masks.window, 0) // Q * Q
    return begin, end


@triton.jit
def _add(ptr, stride, query, num_queries, dq, D: tl.constexpr):
    """Add dq (D_PADDED, Q) to the rows of these queries, atomically."""
    column = tl.arange(0, dq.shape[0])[:, None]
    place = ptr + query.to(tl.int64)[None, :] * stride + column
    tl.atomic_add(place, dq, mask=(query < num_queries)[None, :] & (column < D), sem="relaxed")


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
    rotary_ptr,
    seed_ptr,
    size,
    row_blocks,
    score_scale,
    site,
    threshold,
    scale,
    CAUSAL: tl.constexpr,
    SHARE: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    WITH_DQ: tl.constexpr,
):
    """dK and dV of K keys; arguments as in `attention_backward_queries`; grid (key tiles, G, B).

    WITH_DQ: dQ too, written when these are all keys of their sequence, else added to that of the other programs.
    Scores are held as (K, Q), so that P and dS go from the registers of one product straight into the next.
    """
    key_start = tl.program_id(0) * K
    first, num_queries, num_keys = _sequence(masks, size)
    if key_start >= num_queries:
        return
    key_head = tl.program_id(1)
    num_heads = tl.num_programs(1) * SHARE
    hidden = num_heads * D
    width = (SHARE + 2) * tl.num_programs(1) * D
    qkv_ptr += _offset(first, masks, strides)
    dout_ptr += _offset(first, masks, dout_strides)
    dqkv_ptr += first * width
    key = key_start + tl.arange(0, K)[:, None]
    gradient_scale = score_scale * scale * LN_2

    begin, end = _queries_of_keys(key_start, num_queries, num_keys, masks, CAUSAL, Q, K, WITH_DQ)
    _, k_ptr, v_ptr = _head(qkv_ptr, strides, key_head * SHARE, SHARE)
    k = load_turned(k_ptr, strides.row, rotary_ptr, key_start, num_keys, K, D, D_PADDED)
    v = load_rows(v_ptr, strides.row, key_start, num_keys, K, D, D_PADDED)
    bias = _load_bias(masks, key, num_keys, first, score_scale) if masks.key_bias is not None else 0.0
    dk = tl.zeros((K, D_PADDED), tl.float32)
    dv = tl.zeros((K, D_PADDED), tl.float32)
    for sharer in range(SHARE):
        head = key_head * SHARE + sharer
        q_ptr, _, _ = _head(qkv_ptr, strides, head, SHARE)
        dropout, salt = dropout_key(seed_ptr, site, tl.program_id(2) * num_heads + head)
        lse_row = head.to(tl.int64) * (row_blocks * 16) + first
        for query_start in range(begin, end, Q):
            query = query_start + tl.arange(0, Q)
            q = load_turned(q_ptr, strides.row, rotary_ptr, query_start, num_queries, Q, D, D_PADDED)
            dout = load_rows(dout_ptr + head * D, dout_strides.row, query_start, num_queries, Q, D, D_PADDED)
            lse = tl.load(lse_ptr + lse_row + query, mask=query < num_queries, other=float("inf"))
            if WITH_DQ:
                out = load_rows(out_ptr + first * hidden + head * D, hidden, query_start, num_queries, Q, D, D_PADDED)
                delta = _delta(dout, out, scale)
            else:
                delta = tl.load(delta_ptr + lse_row + query, mask=query < num_queries, other=0.0)
            scores = tl.dot(k, tl.trans(q), input_precision="tf32x3")
            if masks.key_bias is not None:
                scores += bias
            # A mask of keys alone is needed for dQ only: a key that nobody sees spoils but its own dK and dV, set to 0 below.
            if WITH_DQ or CAUSAL or masks.segment_ids is not None or masks.window is not None:
                scores = _hide(scores, query[None, :], key, num_queries, num_keys, first, masks, CAUSAL)
            p = tl.math.exp2(scores * score_scale - lse[None, :])
            kept = drop_transposed(p, dropout, salt, query_start, key_start, threshold) if seed_ptr is not None else p
            dv = tl.dot(kept.to(dout.dtype), dout, dv, input_precision="tf32x3")
            dp = tl.dot(v, tl.trans(dout), input_precision="tf32x3")
            # P M dP - P delta: what was dropped need not be dropped again
            ds = kept * dp - p * delta[None, :] if seed_ptr is not None else p * (dp - delta[None, :])
            ds = ds.to(q.dtype)
            dk = tl.dot(ds, q, dk, input_precision="tf32x3")
            if WITH_DQ:
                # (D, Q), because wgmma takes no fewer than 64 rows
                dq = tl.dot(tl.trans(k), ds, input_precision="tf32x3") * gradient_scale
                if dq_sum_ptr is not None:
                    _add(dq_sum_ptr + first * hidden + head * D, hidden, query, num_queries, dq, D)
                else:
                    dq = tl.trans(dq)
                    store_turned_back(dqkv_ptr + head * D, width, rotary_ptr, query_start, num_queries, dq, D)

    seen = _is_key(key, num_keys, first, masks)
    dk_ptr = dqkv_ptr + hidden + key_head * D
    dv_ptr = dk_ptr + tl.num_programs(1) * D
    # dV first: its registers are free then, while dK is turned back
    store_rows(dv_ptr, width, key_start, num_queries, tl.where(seen, dv * scale, 0.0), D)
    dk = tl.where(seen, dk * gradient_scale, 0.0)
    store_turned_back(dk_ptr, width, rotary_ptr, key_start, num_queries, dk, D)


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
        additions take more instructions than forming P twice; nor with rotary, where their sums would have to be turned back.
    """
    length, num_sequences = sequence_grid(qkv, options)
    num_heads, key_heads = heads(qkv, options)
    shared = shared_arguments(qkv, options)
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    given = dout, Strides(0 if options.cu_seqlens is not None else dout.stride(0), dout.stride(-2)), qkv
    dqkv = qkv.new_empty(qkv.shape)
    rows, keys = (tiles or choose_tiles(qkv, length, options))[1:]
    grid = (triton.cdiv(length, keys.keys), key_heads, num_sequences)

    def run_keys(out: Tensor | None, delta: Tensor | None, dq_sum: Tensor | None) -> None:
        tile = keys.queries, keys.keys, delta is None
        attention_backward_keys[grid](*given, out, lse, delta, dq_sum, dqkv, *shared, *tile, **keys.options())

    if rows is None:
        run_keys(out, None, None)
    elif stochastic and options.drops and qkv.shape[-1] <= 64 and qkv.dtype != torch.float32 and options.rotary is None:
        dq = torch.zeros_like(out, dtype=torch.float32)
        run_keys(out, None, dq)
        by_token = dqkv.flatten(dout.ndim - 1)
        by_token[..., : dq.shape[-1]].copy_(dq)
    else:
        delta = torch.empty_like(lse)
        attention_backward_queries[(triton.cdiv(length, rows.queries), num_heads, num_sequences)](
            *given, out, lse, delta, dqkv, *shared, rows.queries, rows.keys, **rows.options()
        )
        run_keys(None, delta, None)
    return dqkv
