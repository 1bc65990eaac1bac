"""GPU kernels of multi-head attention over a packed QKV projection, forward and backward.

Online softmax over key tiles (FlashAttention-2, Dao 2023), in powers of two: with c = log2(e) / sqrt(D) the forward keeps
L = log2(sum over keys of 2**(c q k')) per row, from which backward forms P = 2**(c q k' - L) again. With M the kept
decisions of dropout and r the factor of the kept elements,

    O = r (M P) V          dV = r (M P)' dO        dP = r M (dO V')
    dS = P (dP - rowsum(dO O))          dQ = dS K / sqrt(D)          dK = dS' Q / sqrt(D)

and r leaves every inner loop: it multiplies the sums at their end. Forward and what it shares with backward stand here,
backward in attention_backward_triton.py. Products of fp32 tensors take three tf32 products each ("tf32x3"), which is fp32
precision on the tensor cores.

All sequences lie in rows of tokens: sequence b of a padded batch starts at row b * S, of a packed one at cu_seqlens[b].
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import target_info

from ...errors import UserError
from ..dropout import drop_threshold, keep_scale
from ..dropout_triton import SEED
from .attention_dropout_triton import drop, dropout_key
from .attention_rows_triton import load_rows, load_turned, store_rows
from .attention_tiles import Tiles, tiles_for

LN_2 = tl.constexpr(math.log(2))
# Kernels take numbers by these names, with no variants for 1 and for multiples of 16: packed batches have any number of
# rows, and training would stop for seconds to compile.
NUMBERS = ["row_blocks", "site", "threshold"]
_LARGEST_BATCH = 65535  # CUDA's limit for the third dim of a grid
_WIDEST_WINDOW = 2**30  # places of 32 bits with such a window added do not overflow


class Options(NamedTuple):
    """What attention is asked for, in the order of the operators.

    Which keys a query sees: those with key_mask (B or 1, S) bool True, default all; those of its own segment, segment_ids
        (B or 1, S) int, default one; none behind it when causal; the first lengths[b] of its sequence, lengths (B,) int32,
        default all. What several of these allow must hold together. Queries at padding attend too.
    key_bias: (B or 1, S) fp32, for padded batches, added to the scaled scores. Its largest value in each sequence should be
        0: lse would lose the precision that a huge one takes. -inf hides a key.
    cu_seqlens: (B + 1,) int32, borders of the packed sequences, starting at 0 and ending at T, empty sequences allowed;
        max_length: no fewer than the tokens of the longest one. lengths is for padded batches only; key_mask and segment_ids
        are (T,) when packed.
    p, seed, site: dropout of the probabilities as in `kernels.dropout`, seed an int64 scalar on the device; None: no dropout.
        Decisions depend on seed, site, sequence number, head, and places of query and key within their sequence.
    key_heads: G of qkv (B, S, N + 2G, D) or (T, N + 2G, D); None: qkv holds as many key heads as query heads.
    rotary: (L, D) fp32, L no less than the tokens of the longest sequence: cosines, then sines, of the angles that queries and
        keys are turned by; None: they are not turned.
    window: a query sees keys at most so many tokens away; None: at any distance.
    """

    key_mask: Tensor | None = None
    segment_ids: Tensor | None = None
    key_bias: Tensor | None = None
    cu_seqlens: Tensor | None = None
    seed: Tensor | None = None
    max_length: int | None = None
    causal: bool = False
    p: float = 0.0
    site: int = 0
    key_heads: int | None = None
    rotary: Tensor | None = None
    window: int | None = None
    lengths: Tensor | None = None

    @property
    def drops(self) -> bool:
        """Whether there is dropout."""
        return self.seed is not None and self.p > 0


_NO_OPTIONS = Options()


class Masks(NamedTuple):
    """Which keys the queries see, as the kernels take it; T for B * S where a batch is packed. None: all."""

    window: int | None
    lengths: Tensor | None  # (B,) int32
    cu_seqlens: Tensor | None  # (B + 1,) int32; None: the batch is padded
    key_mask: Tensor | None  # (B * S,) bool
    segment_ids: Tensor | None  # (B * S,) int
    key_bias: Tensor | None  # (B * S,) fp32


class Strides(NamedTuple):
    """Steps within qkv of either form; within the gradient of the output those of the first two alone."""

    batch: int  # 0 where the batch is packed
    row: int
    part: int = 0  # from keys to values; from queries to keys it is SHARE times as far
    head: int = 0


@triton.jit
def _sequence(masks, size):
    """The first row of this program's sequence, and how many queries and keys it has."""
    index = tl.program_id(2)
    if masks.cu_seqlens is not None:
        first = tl.load(masks.cu_seqlens + index)
        num_queries = tl.load(masks.cu_seqlens + index + 1) - first
        num_keys = num_queries
        first = first.to(tl.int64)
    else:
        first = index.to(tl.int64) * size
        num_queries = size
        num_keys = size
        if masks.lengths is not None:
            num_keys = tl.minimum(tl.load(masks.lengths + index), size)
    return first, num_queries, num_keys


@triton.jit
def _offset(first, masks, strides):
    """Where this program's sequence starts in a tensor with these strides."""
    if masks.cu_seqlens is not None:
        offset = first * strides.row
    else:
        offset = tl.program_id(2).to(tl.int64) * strides.batch
    return offset


@triton.jit
def _head(qkv_ptr, strides, head, SHARE: tl.constexpr):
    """Where queries, keys and values of a query head lie, in a sequence that starts at qkv_ptr."""
    q_ptr = qkv_ptr + head.to(tl.int64) * strides.head
    k_ptr = qkv_ptr + (head // SHARE).to(tl.int64) * strides.head + SHARE * strides.part
    return q_ptr, k_ptr, k_ptr + strides.part


@triton.jit
def _load_bias(masks, key, num_keys, first, score_scale):
    """What to add to q k', in the shape of key: the bias times sqrt(D). Far below 0 it may become -inf, which hides the key."""
    bias = tl.load(masks.key_bias + first + key, mask=key < num_keys, other=0.0)
    return bias * (1 / (score_scale * LN_2))


@triton.jit
def _is_key(key, num_keys, first, masks):
    """Whether any query may see the key."""
    seen = key < num_keys
    if masks.key_mask is not None:
        seen = seen & (tl.load(masks.key_mask + first + key, mask=seen, other=0) != 0)
    return seen


@triton.jit
def _hide(scores, query, key, num_queries, num_keys, first, masks, CAUSAL: tl.constexpr):
    """scores with -inf where the query must not see the key; query (Q, 1), key (1, K), or (1, Q) and (K, 1)."""
    visible = _is_key(key, num_keys, first, masks)
    if masks.segment_ids is not None:
        key_segment = tl.load(masks.segment_ids + first + key, mask=visible, other=0)
        query_segment = tl.load(masks.segment_ids + first + query, mask=query < num_queries, other=0)
        visible = visible & (key_segment == query_segment)
    if CAUSAL:
        visible = visible & (key <= query)
    if masks.window is not None:
        visible = visible & (key >= query - masks.window)
        if not CAUSAL:
            visible = visible & (key <= query + masks.window)
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def _key_tiles(query_start, num_keys, masks, CAUSAL: tl.constexpr, Q: tl.constexpr, K: tl.constexpr):
    """(full, rest, begin, end): tiles full .. rest hold keys that every query of the tile sees whole and without bias, tiles
    begin .. end those that need `_load_bias` and `_hide`, of which `_masked_tile` tells the place."""
    full = 0
    end = num_keys
    rest = num_keys // K * K
    if CAUSAL:
        end = tl.minimum(end, query_start + Q)
        rest = tl.minimum(rest, query_start // K * K)
    elif masks.window is not None:
        end = tl.minimum(end, query_start + Q + masks.window)
        rest = tl.minimum(rest, (query_start + masks.window + 1) // K * K)
    if masks.window is not None:
        full = tl.minimum(tl.cdiv(tl.maximum(query_start + Q - 1 - masks.window, 0), K) * K, rest)
    if masks.key_mask is not None or masks.segment_ids is not None or masks.key_bias is not None:
        full = full * 0
        rest = rest * 0
    begin = rest
    if masks.window is not None:
        begin = tl.maximum(query_start - masks.window, 0) // K * K
        end -= rest - full
    return full, rest, begin, end


@triton.jit
def _masked_tile(tile, full, rest, masks):
    """Where the keys of a masked tile start: those of a window lie on both sides of the full ones, which are left out."""
    start = tile
    if masks.window is not None:
        start = tile + tl.where(tile < full, 0, rest - full)
    return start


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=SEED)
def attention_forward(
    qkv_ptr,  # (B, S, 3, N, D) or (B, S, N + 2G, D), packed with T for B, S
    out_ptr,  # (B, S, N * D) or (T, N * D)
    lse_ptr,  # (N, row_blocks * 16) fp32
    masks,  # Masks
    strides,  # Strides of qkv
    rotary_ptr,  # (L, D) fp32 or None
    seed_ptr,  # () int64 or None
    size,  # S of a padded batch
    row_blocks,  # ceil(B * S / 16) or ceil(T / 16): rows of lse start at multiples of 16, so that loads of it can be wide
    score_scale,  # log2(e) / sqrt(D)
    site,
    threshold,
    scale,
    CAUSAL: tl.constexpr,
    SHARE: tl.constexpr,  # N / G
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
):
    """One tile of Q queries of one head of one sequence; grid (query tiles, N, B)."""
    # the last tile sees most keys when causal: start it first
    query_start = (tl.num_programs(0) - 1 - tl.program_id(0)) * Q
    head = tl.program_id(1)
    first, num_queries, num_keys = _sequence(masks, size)
    q_ptr, k_ptr, v_ptr = _head(qkv_ptr + _offset(first, masks, strides), strides, head, SHARE)
    dropout, salt = dropout_key(seed_ptr, site, tl.program_id(2) * tl.num_programs(1) + head)
    if query_start >= num_queries:
        return
    query = query_start + tl.arange(0, Q)

    full, rest, begin, end = _key_tiles(query_start, num_keys, masks, CAUSAL, Q, K)
    q = load_turned(q_ptr, strides.row, rotary_ptr, query_start, num_queries, Q, D, D_PADDED)
    highest = tl.full((Q,), float("-inf"), tl.float32)
    total = tl.zeros((Q,), tl.float32)
    acc = tl.zeros((Q, D_PADDED), tl.float32)
    for masked in tl.static_range(2):
        for tile in range(begin if masked else full, end if masked else rest, K):
            key_start = _masked_tile(tile, full, rest, masks) if masked else tile
            k = load_turned(k_ptr, strides.row, rotary_ptr, key_start, num_keys, K, D, D_PADDED)
            scores = tl.dot(q, tl.trans(k), input_precision="tf32x3")
            if masked:
                key = key_start + tl.arange(0, K)[None, :]
                if masks.key_bias is not None:
                    scores += _load_bias(masks, key, num_keys, first, score_scale)
                scores = _hide(scores, query[:, None], key, num_queries, num_keys, first, masks, CAUSAL)
            new_highest = tl.maximum(highest, tl.max(scores, 1) * score_scale)
            # a row that has seen no key yet has -inf here, and -inf - -inf would be NaN
            pivot = tl.where(new_highest == float("-inf"), 0.0, new_highest) if masked else new_highest
            p = tl.math.exp2(scores * score_scale - pivot[:, None])
            decay = tl.math.exp2(highest - pivot)
            highest = new_highest
            total = total * decay + tl.sum(p, 1)
            if seed_ptr is not None:
                p = drop(p, dropout, salt, query_start, key_start, threshold)
            v = load_rows(v_ptr, strides.row, key_start, num_keys, K, D, D_PADDED)
            acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="tf32x3")

    # without a visible key the output is 0, and L = inf makes P of backward 0
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    out = acc * (scale / total)[:, None]
    lse = tl.where(empty, float("inf"), highest + tl.math.log2(total))
    hidden = tl.num_programs(1) * D
    store_rows(out_ptr + first * hidden + head * D, hidden, query_start, num_queries, out, D)
    lse_rows = lse_ptr + head.to(tl.int64) * (row_blocks * 16) + first
    tl.store(lse_rows + query, lse, mask=query < num_queries)


def heads(qkv: Tensor, options: Options) -> tuple[int, int]:
    """(N, G), the numbers of query heads and of key heads."""
    if options.key_heads is None:
        return qkv.shape[-2], qkv.shape[-2]
    return qkv.shape[-2] - 2 * options.key_heads, options.key_heads


def _tokens(qkv: Tensor, options: Options) -> torch.Size:
    """(B, S), or (T,) of a packed batch."""
    return qkv.shape[: 2 if options.cu_seqlens is None else 1]


def _row_blocks(qkv: Tensor, options: Options) -> int:
    """How many blocks of 16 hold the rows of qkv."""
    return triton.cdiv(math.prod(_tokens(qkv, options)), 16)


def shared_arguments(qkv: Tensor, options: Options) -> tuple[Any, ...]:
    """The arguments that every kernel takes after its own tensors, from masks to D_PADDED."""
    packed, size = options.cu_seqlens is not None, qkv.shape[-1]
    num_heads, key_heads = heads(qkv, options)
    tokens = _tokens(qkv, options)
    row, *part, head, column = qkv.stride()[len(tokens) - 1 :]
    assert column == 1, "a head's columns lie side by side in the output of the QKV projection"
    assert size <= 128, "no tile for such heads"
    # the kernels index these without strides, and one row of a mask may stand for the whole batch
    lengths, borders = (None if mask is None else mask.contiguous() for mask in (options.lengths, options.cu_seqlens))
    by_token = (None if mask is None else mask.expand(tokens).contiguous() for mask in options[:3])
    window = None if options.window is None else min(options.window, _WIDEST_WINDOW)
    return (
        Masks(window, lengths, borders, *by_token),
        Strides(0 if packed else qkv.stride(0), row, part[0] if part else key_heads * head, head),
        None if options.rotary is None else options.rotary.contiguous(),
        options.seed if options.drops else None,
        0 if packed else qkv.shape[1],
        _row_blocks(qkv, options),
        math.log2(math.e) / math.sqrt(size),
        options.site,
        drop_threshold(options.p),
        keep_scale(options.p) if options.drops else 1.0,
        options.causal,
        num_heads // key_heads,
        size,
        max(16, triton.next_power_of_2(size)),
    )


def sequence_grid(qkv: Tensor, options: Options) -> tuple[int, int]:
    """(tokens of the longest sequence, number of sequences); raises ValueError for more sequences than a grid takes."""
    if options.cu_seqlens is None:
        num_sequences, length = qkv.shape[:2]
    else:
        assert options.max_length is not None, "the host does not know how long the longest packed sequence is"
        num_sequences, length = options.cu_seqlens.numel() - 1, options.max_length
    if num_sequences > _LARGEST_BATCH:
        raise UserError(
            f"B={num_sequences} sequences are over {_LARGEST_BATCH}, the most that the GPU kernels of attention take in one "
            f"call; split the batch, or use kernels='reference'"
        )
    return length, num_sequences


def choose_tiles(qkv: Tensor, length: int, options: Options) -> Tiles:
    """Return the tiles of this device for sequences of up to `length` tokens."""
    target = target_info.current_target()  # None in triton's interpreter
    capability, bits = 80 if target is None else target.arch, 8 * qkv.itemsize
    by_token = options.key_mask is not None or options.key_bias is not None
    masked = options.segment_ids is not None or options.window is not None or (by_token and options.rotary is not None)
    limited = qkv.dtype == torch.bfloat16 and not masked
    return tiles_for(capability, bits, qkv.shape[-1], length, options.drops, limited, options.rotary is not None)


def forward(qkv: Tensor, options: Options = _NO_OPTIONS, tiles: Tiles | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse): the attention output before its projection, and what `backward` needs besides.

    qkv: (B, S, 3, N, D) padded or (T, 3, N, D) packed, with key_heads (B, S, N + 2G, D) or (T, N + 2G, D); fp16, bf16 or fp32,
        D at most 128, any strides with the columns of a head side by side. tiles: None for those that `attention_tiles` has for
        this device.
    out: (B, S, N * D) or (T, N * D), contiguous, in the dtype of qkv; 0 for a query without a visible key.
    lse: (N, B * S or T, rounded up to a multiple of 16) fp32, log2 of the sum of exp of the scaled scores; inf for a query
        without a visible key.
    """
    length, num_sequences = sequence_grid(qkv, options)
    num_heads, _ = heads(qkv, options)
    out = qkv.new_empty((*_tokens(qkv, options), num_heads * qkv.shape[-1]))
    lse = qkv.new_empty((num_heads, _row_blocks(qkv, options) * 16), dtype=torch.float32)
    tile = (tiles or choose_tiles(qkv, length, options)).forward
    attention_forward[(triton.cdiv(length, tile.queries), num_heads, num_sequences)](
        qkv, out, lse, *shared_arguments(qkv, options), tile.queries, tile.keys, **tile.options()
    )
    return out, lse
