"""Grouped key heads, rotary embedding and windows in the attention kernels, against the explicit formula in fp64."""

import math

import pytest
import torch
import triton
import triton.language as tl
from helpers.attention_kernels import (
    SITE,
    assert_as_exact_as_torch,
    draw_mask,
    masks_of,
    run,
    seed,
    visible_keys,
    with_gradient,
)

from xformer_train.kernels.ops.attention.attention_tiles import tiles_for
from xformer_train.kernels.ops.attention.attention_triton import Masks, _key_tiles, _masked_tile
from xformer_train.kernels.ops.attention.rotary import rotary_table
from xformer_train.kernels.ops.dropout import keep_scale

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")
HALF, FULL = torch.float16, torch.float32
CASES = [  # kind of mask, (B, S, N, D), key heads, turned, window, dtype, p
    ("all", (1, 17, 6, 16), 1, False, None, FULL, 0.1),
    ("lengths", (4, 65, 6, 16), 2, False, None, HALF, 0.0),
    ("causal", (1, 130, 6, 16), 3, False, None, HALF, 0.1),
    ("all", (2, 17, 2, 6), None, True, None, FULL, 0.1),
    ("key_mask", (2, 100, 1, 40), None, True, None, HALF, 0.1),
    ("causal", (1, 257, 1, 64), None, True, None, HALF, 0.0),
    ("bias", (2, 130, 1, 80), None, True, None, HALF, 0.1),
    ("causal", (1, 70, 1, 128), None, True, None, FULL, 0.0),
    ("all", (1, 257, 1, 16), None, False, 1, HALF, 0.1),
    ("causal", (1, 257, 1, 16), None, False, 1, HALF, 0.0),
    ("lengths", (4, 257, 1, 16), None, False, 5, FULL, 0.1),
    ("key_mask", (2, 200, 1, 16), None, False, 5, HALF, 0.1),
    ("causal segments", (2, 150, 1, 16), None, False, 64, HALF, 0.1),
    ("all", (1, 600, 1, 16), None, False, 200, HALF, 0.1),
    ("causal", (1, 600, 1, 16), None, False, 300, HALF, 0.0),
    ("all", (1, 140, 1, 16), None, False, 1000, HALF, 0.1),
    ("causal", (1, 70, 1, 16), None, False, 2**40, FULL, 0.0),
    # as models use them
    ("causal segments", (2, 150, 6, 64), 2, True, None, HALF, 0.1),
    ("causal segments", (2, 100, 3, 64), 1, True, None, HALF, 0.0),
    ("causal", (1, 150, 4, 128), 1, True, 40, HALF, 0.0),
    ("causal lengths", (3, 130, 4, 128), 2, True, 64, HALF, 0.1),
    ("key_mask", (2, 300, 1, 64), None, True, 64, HALF, 0.1),
    ("key_mask", (2, 128, 1, 64), None, True, 64, FULL, 0.0),
    ("lengths", (4, 150, 3, 40), 3, True, 5, FULL, 0.5),
]


def drawn(shape, key_heads, dtype):
    """qkv and the gradient of the output."""
    *tokens, heads, dim = shape
    parts = (3, heads) if key_heads is None else (heads + 2 * key_heads,)
    return torch.randn(*tokens, *parts, dim).to(dtype), torch.randn(*tokens, heads * dim).to(dtype)


@pytest.mark.parametrize(("kind", "shape", "key_heads", "turns", "window", "dtype", "p"), CASES)
def test_output_and_gradient_are_as_exact_as_torchs(kind, shape, key_heads, turns, window, dtype, p):
    batch, size, heads, dim = shape
    masks = masks_of(kind, batch, size)
    qkv, dout = drawn(shape, key_heads, dtype)
    rotary = rotary_table(size + 3, dim, 100.0) if turns else None
    pattern = {"key_heads": key_heads, "rotary": rotary, "window": window}
    out, dqkv = run(dout, qkv, **masks, **pattern, p=p, seed=seed(), site=SITE)

    kept = draw_mask(batch * heads, size, p).unflatten(0, (batch, heads)) if p else torch.ones(())
    bias = masks.pop("key_bias", torch.zeros(batch, size))
    visible = visible_keys(batch, size, **masks, window=window)
    arguments = visible, bias, kept, keep_scale(p), key_heads, rotary
    exact = with_gradient(qkv.double(), dout.double(), *arguments)
    same_dtype = with_gradient(qkv, dout, *arguments)
    assert out.dtype == dqkv.dtype == dtype
    assert dqkv.is_contiguous()
    assert dqkv.shape == qkv.shape
    assert_as_exact_as_torch(out, same_dtype[0], exact[0])
    for mine, theirs, right in zip(
        *(parts_of(x, heads, key_heads) for x in (dqkv, same_dtype[1], exact[1])), strict=True
    ):
        assert_as_exact_as_torch(mine, theirs, right)


def parts_of(dqkv, heads, key_heads):
    """Gradients of queries, keys and values, each of which must be right by itself."""
    if key_heads is None:
        return dqkv.unbind(2)
    return dqkv.split([heads, key_heads, key_heads], 2)


@pytest.mark.parametrize(
    ("size", "dim", "key_heads", "window", "causal"),
    [(100, 64, None, 5, False), (140, 16, 1, None, True), (129, 80, 2, 64, True), (128, 64, None, 64, False)],
)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_packed_equals_padded_bit_for_bit_as_places_are_counted_within_each_sequence(
    size, dim, key_heads, window, causal, p
):
    lengths = torch.tensor([size // 3, 0, size]).int()
    qkv, dout = drawn((3, size, 2, dim), key_heads, HALF)
    real = torch.arange(size) < lengths[:, None]
    dout[~real] = 0  # queries at padding attend too; without a gradient they add none
    options = {"causal": causal, "p": p, "seed": seed(), "site": SITE, "key_heads": key_heads, "window": window}
    options["rotary"] = rotary_table(size, dim, 100.0)
    padded = run(dout, qkv, lengths=lengths, **options)
    borders = torch.tensor([0, *lengths.cumsum(0)]).int()
    packed = run(dout[real], qkv[real], cu_seqlens=borders, max_length=size, **options)
    for one, other in zip(padded, packed, strict=True):
        assert torch.equal(one[real], other)
        assert other.isfinite().all()


@pytest.mark.parametrize("size", [100, 200])
def test_in_a_window_of_nothing_a_query_sees_itself(size):
    qkv, dout = drawn((1, size, 2, 16), 1, HALF)
    out, dqkv = run(dout, qkv, key_heads=1, window=0)
    out, dout = (x.unflatten(-1, (2, 16)) for x in (out, dout))
    assert torch.equal(out, qkv[:, :, 3:].expand(1, size, 2, 16))
    torch.testing.assert_close(dqkv[:, :, 3:], dout.sum(2, keepdim=True), rtol=1e-3, atol=1e-3)
    assert dqkv[:, :, :3].abs().max() < 2e-2  # the rounding of dP - delta


def test_segments_of_a_row_need_no_places_of_their_own():
    lengths = [70, 1, 57]
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None].int()
    qkv, dout = drawn((1, 128, 2, 16), 1, HALF)
    options = {"key_heads": 1, "rotary": rotary_table(128, 16, 100.0), "causal": True, "window": 9}
    borders = torch.tensor([0, 70, 71, 128]).int()
    in_a_row = run(dout, qkv, segment_ids=segments, **options)
    packed = run(dout[0], qkv[0], cu_seqlens=borders, max_length=128, **options)
    for one, other in zip(in_a_row, packed, strict=True):
        torch.testing.assert_close(one[0], other, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("size", [65, 129])
def test_grouped_heads_that_are_not_shared_equal_plain_ones_bit_for_bit(size):
    qkv, dout = drawn((2, size, 2, 16), None, HALF)
    options = {"p": 0.1, "seed": seed(), "site": SITE, "causal": True}
    plain = run(dout, qkv, **options)
    grouped = run(dout, qkv.flatten(2, 3), **options, key_heads=2)
    assert torch.equal(plain[0], grouped[0])
    assert torch.equal(plain[1].flatten(2, 3), grouped[1])


def test_strided_inputs_equal_contiguous_ones():
    wide = torch.randn(2, 135, 5, 32).half()
    qkv, table = wide[:, 3:133, 1:, 8:24], rotary_table(200, 16, 100.0)
    dout = torch.randn(130, 32, 2).half().permute(2, 0, 1)
    options = {"key_heads": 1, "window": 20}
    strided = run(dout, qkv, rotary=table.t().contiguous().t(), **options)
    contiguous = run(dout.contiguous(), qkv.contiguous(), rotary=table[:130], **options)
    for one, other in zip(strided, contiguous, strict=True):
        assert torch.equal(one, other)


def test_two_runs_give_the_same_bits_with_shared_key_heads():
    qkv, dout = drawn((1, 130, 6, 16), 2, HALF)
    options = {"key_heads": 2, "rotary": rotary_table(130, 16, 100.0), "p": 0.1, "seed": seed(), "site": SITE}
    first, second = (run(dout, qkv, **options) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize(("size", "dim"), [(64, 64), (128, 64), (150, 64), (150, 128)])
def test_the_tiles_of_every_device_give_the_same_up_to_rounding(size, dim):
    qkv, dout = drawn((1, size, 2, dim), 1, HALF)
    options = {"key_heads": 1, "rotary": rotary_table(size, dim, 100.0), "window": size // 3, "causal": True}
    results = []
    for capability in (80, 90):
        tiles = tiles_for(capability, 16, dim, size, drops=True, limited=True, turned=True)
        results.append(run(dout, qkv, p=0.1, seed=seed(), site=SITE, tiles=tiles, **options))
    torch.testing.assert_close(*results, rtol=2e-3, atol=2e-3)


@triton.jit
def _tiles_kernel(
    visits_ptr, masks, query_start, num_keys, CAUSAL: tl.constexpr, Q: tl.constexpr, K: tl.constexpr
):  # visits (2, number of key tiles) int32, out: how often each is visited whole, and masked
    full, rest, begin, end = _key_tiles(query_start, num_keys, masks, CAUSAL, Q, K)
    for masked in tl.static_range(2):
        for tile in range(begin if masked else full, end if masked else rest, K):
            key_start = _masked_tile(tile, full, rest, masks) if masked else tile
            tl.atomic_add(visits_ptr + masked * tl.cdiv(num_keys, K) + key_start // K, 1)


@pytest.mark.parametrize("tile", [(32, 16), (16, 64), (64, 64)])
@pytest.mark.parametrize("window", [None, 0, 1, 15, 64, 100, 5000])
@pytest.mark.parametrize("causal", [False, True])
def test_a_tile_of_queries_visits_the_keys_of_its_window_alone_and_masks_only_those_at_its_borders(
    causal, window, tile
):
    num_keys, (Q, K) = 300, tile
    visible = visible_keys(1, num_keys, causal=causal, window=window)[0, 0]
    key_tiles = math.ceil(num_keys / K)
    padded = torch.nn.functional.pad(visible, (0, key_tiles * K - num_keys)).unflatten(1, (key_tiles, K))
    for query_start in range(0, num_keys - Q, Q):  # the last tile may have queries that are not there
        visits = torch.zeros(2, key_tiles, dtype=torch.int32)
        _tiles_kernel[(1,)](visits, Masks(window, *[None] * 5), query_start, num_keys, causal, Q, K)
        rows = padded[query_start : query_start + Q]
        assert torch.equal(visits[0] == 1, rows.all(2).all(0))
        assert torch.equal(visits.sum(0) == 1, rows.any(2).any(0))
        assert visits.max() <= 1
