"""The attention kernels against the explicit formula in fp64, under the mask that the kernels themselves draw."""

import math
import os

import pytest
import torch
import triton
import triton.language as tl
from helpers.exactness import allowed_error

from xformer_train.kernels.ops.attention import attention as attention_module
from xformer_train.kernels.ops.attention.attention import AttentionMask, attention
from xformer_train.kernels.ops.attention.attention_backward_triton import backward
from xformer_train.kernels.ops.attention.attention_dropout_triton import (
    drop,
    drop_transposed,
    dropout_key,
    philox_2x32,
)
from xformer_train.kernels.ops.attention.attention_tiles import tiles_for
from xformer_train.kernels.ops.attention.attention_triton import forward
from xformer_train.kernels.ops.dropout import drop_threshold, keep_scale

SITE = 1
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def seed():
    return torch.tensor(2**62 + 987654321)


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)  # which also fills what torch.empty gives
    yield
    torch.use_deterministic_algorithms(False)


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


def explicit_attention(qkv, visible, bias, mask, scale):
    """(B, S, N * D); rows without a visible key are 0."""
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
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


def visible_keys(batch, size, lengths=None, key_mask=None, segment_ids=None, causal=False):
    """(B, 1, S, S) bool."""
    visible = torch.ones(batch, 1, size, size, dtype=torch.bool)
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


def run(dout, qkv, **arguments):
    out, lse = forward(qkv, **arguments)
    return out, backward(dout, qkv, out, lse, **arguments)


HALF, FULL, BRAIN = torch.float16, torch.float32, torch.bfloat16
CASES = [  # kind of mask, (B, S, N, D), dtype, p
    ("all", (1, 1, 2, 16), HALF, 0.0),
    ("all", (2, 17, 2, 5), FULL, 0.1),
    ("lengths", (4, 17, 1, 64), HALF, 0.5),
    ("causal", (1, 64, 2, 64), HALF, 0.1),
    ("causal", (1, 64, 1, 64), FULL, 0.0),
    ("all", (1, 128, 2, 64), HALF, 0.1),
    ("lengths", (4, 100, 1, 16), HALF, 0.1),
    ("lengths", (4, 65, 1, 16), FULL, 0.5),
    ("key_mask", (2, 100, 1, 64), HALF, 0.0),
    ("causal segments", (2, 100, 1, 5), HALF, 0.1),
    ("causal key_mask segments", (1, 128, 1, 16), HALF, 0.5),
    ("causal", (1, 257, 1, 64), HALF, 0.1),
    ("lengths", (4, 257, 1, 16), HALF, 0.0),
    ("lengths", (4, 130, 1, 80), HALF, 0.5),
    ("causal segments", (1, 257, 1, 16), HALF, 0.1),
    ("causal lengths", (3, 200, 1, 5), HALF, 0.1),
    ("key_mask", (1, 257, 1, 64), HALF, 0.1),
    ("causal", (1, 128, 1, 128), HALF, 0.1),
    ("key_mask", (1, 70, 1, 128), FULL, 0.1),
    ("bias", (2, 17, 2, 5), FULL, 0.1),
    ("bias", (2, 100, 1, 64), HALF, 0.1),
    ("bias", (2, 257, 1, 16), HALF, 0.1),
    ("bias", (2, 130, 1, 80), HALF, 0.0),
]
if not INTERPRETED:  # its products of bf16 are wrong
    CASES += [
        ("all", (1, 128, 2, 64), BRAIN, 0.1),
        ("lengths", (4, 257, 1, 64), BRAIN, 0.0),
        ("causal", (1, 257, 1, 64), BRAIN, 0.1),
        ("key_mask", (2, 100, 1, 64), BRAIN, 0.1),
        ("bias", (2, 100, 1, 64), BRAIN, 0.1),
        ("bias", (2, 257, 1, 64), BRAIN, 0.1),
        ("causal", (1, 257, 1, 128), BRAIN, 0.1),
    ]


@pytest.mark.parametrize(("kind", "shape", "dtype", "p"), CASES)
def test_output_and_gradient_are_as_exact_as_torchs(kind, shape, dtype, p):
    batch, size, heads, dim = shape
    masks = masks_of(kind, batch, size)
    qkv = torch.randn(batch, size, 3, heads, dim).to(dtype)
    dout = torch.randn(batch, size, heads * dim).to(dtype)
    out, dqkv = run(dout, qkv, **masks, p=p, seed=seed(), site=SITE)

    kept = draw_mask(batch * heads, size, p).unflatten(0, (batch, heads)) if p else torch.ones(())
    bias = masks.pop("key_bias", torch.zeros(batch, size))
    arguments = visible_keys(batch, size, **masks), bias, kept, keep_scale(p)
    exact = with_gradient(qkv.double(), dout.double(), *arguments)
    same_dtype = with_gradient(qkv, dout, *arguments)
    assert out.dtype == dqkv.dtype == dtype
    assert dqkv.is_contiguous()
    assert dqkv.shape == qkv.shape
    assert_as_exact_as_torch(out, same_dtype[0], exact[0])
    assert_as_exact_as_torch(dqkv, same_dtype[1], exact[1])


@pytest.mark.parametrize("size", [100, 150])
def test_rows_without_a_visible_key_give_zero_and_have_no_gradient(size):
    masks = {"lengths": torch.tensor([0, 3]).int(), "key_mask": torch.ones(2, size, dtype=torch.bool)}
    masks["key_mask"][1, :2] = False
    qkv, dout = torch.randn(2, size, 3, 1, 16).half(), torch.randn(2, size, 16).half()
    out, dqkv = run(dout, qkv, **masks, causal=True)
    assert not out[0].any()
    assert not out[1, :2].any()
    assert torch.equal(out[1, 2:], qkv[1, 2:3, 2, 0].expand(size - 2, 16))  # one visible key: its value
    assert not dqkv[0].any()
    assert not dqkv[1, :2].any()
    assert not dqkv[1, 3:, 1:].any()


@pytest.mark.parametrize(("size", "dim", "causal"), [(100, 64, False), (140, 16, True), (129, 80, False)])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_packed_equals_padded_bit_for_bit(size, dim, causal, p):
    lengths = torch.tensor([size // 3, 0, size]).int()
    qkv, dout = torch.randn(3, size, 3, 2, dim).half(), torch.randn(3, size, 2 * dim).half()
    real = torch.arange(size) < lengths[:, None]
    dout[~real] = 0  # queries at padding attend too; without a gradient they add none
    qkv[~real] = math.nan  # and nothing of theirs may reach a real token
    qkv[~real, 0] = 0
    dropout = {"causal": causal, "p": p, "seed": seed(), "site": SITE}
    padded = run(dout, qkv, lengths=lengths, **dropout)
    borders = torch.tensor([0, *lengths.cumsum(0)]).int()
    packed = run(dout[real], qkv[real], cu_seqlens=borders, max_length=size, **dropout)
    for one, other in zip(padded, packed, strict=True):
        assert torch.equal(one[real], other)
        assert other.isfinite().all()


@pytest.mark.parametrize("size", [40, 130])
def test_the_op_hands_packed_batches_to_the_kernels(monkeypatch, size):
    monkeypatch.setattr(attention_module, "uses_triton", lambda *_: True)
    lengths = torch.tensor([size // 3, 0, size])
    borders = torch.tensor([0, *lengths.cumsum(0)]).int()
    qkv = torch.randn(int(lengths.sum()), 3, 2, 16).half().requires_grad_()
    dout = torch.randn(len(qkv), 32).half()
    mask = AttentionMask(causal=True, cu_seqlens=borders, max_length=size)
    out = attention(qkv, mask, 0.1, seed(), SITE)
    (dqkv,) = torch.autograd.grad(out, qkv, dout)
    packing = {"cu_seqlens": borders, "max_length": size, "causal": True}
    expected = run(dout, qkv.detach(), **packing, p=0.1, seed=seed(), site=SITE)
    assert torch.equal(out, expected[0])
    assert torch.equal(dqkv, expected[1])


def attended(qkv, dout, mask, kernels="auto", p=0.0):
    """Output and gradient of the op."""
    qkv = qkv.detach().requires_grad_()
    out = attention(qkv, mask, p, seed(), SITE, kernels=kernels)
    return out.detach(), torch.autograd.grad(out, qkv, dout)[0]


@pytest.fixture
def kernels_auto_means_triton(monkeypatch):
    monkeypatch.setattr(attention_module, "uses_triton", lambda _, kernels: kernels == "auto")


@pytest.mark.usefixtures("kernels_auto_means_triton")
@pytest.mark.parametrize(
    ("shape", "shift"),
    [
        ((2, 1, 1, 140), 0),
        ((1, 1, 1, 140), 0),
        ((2, 1, 1, 140), 3e4),
        ((2, 2, 1, 140), 0),  # the last two are none per key
        ((1, 1, 140, 140), 0),
    ],
)
def test_the_op_adds_a_bias_of_any_shape_in_place_of_other_masks(shape, shift):
    qkv, dout = torch.randn(2, 140, 3, 2, 16).half(), torch.randn(2, 140, 32).half()
    bias = 16.0 * torch.randint(-2, 1, shape).half()  # fp16 holds it exactly with the shift, but no score besides
    ours = attended(qkv, dout, AttentionMask(causal=True, bias=bias + shift))
    torchs = attended(qkv, dout, AttentionMask(bias=bias), "reference")
    exact = attended(qkv.double(), dout.double(), AttentionMask(bias=bias.double()), "reference")
    for one, same_dtype, reference in zip(ours, torchs, exact, strict=True):
        assert_as_exact_as_torch(one, same_dtype, reference)


@pytest.mark.usefixtures("kernels_auto_means_triton")
@pytest.mark.parametrize("field", ["key_mask", "segment_ids"])
def test_one_row_of_a_mask_holds_for_every_sequence(field):
    qkv, dout = torch.randn(3, 40, 3, 1, 16).half(), torch.randn(3, 40, 16).half()
    row = (torch.arange(40) % 3 > 0)[None] if field == "key_mask" else (torch.arange(40) // 7)[None]
    one = attended(qkv, dout, AttentionMask(**{field: row}))
    every = attended(qkv, dout, AttentionMask(**{field: row.expand(3, 40).contiguous()}))
    assert torch.equal(one[0], every[0])
    assert torch.equal(one[1], every[1])


@pytest.mark.usefixtures("kernels_auto_means_triton")
@pytest.mark.filterwarnings("ignore:overflow")  # to -inf, which hides a key as well
@pytest.mark.parametrize(
    ("size", "dtype", "hidden"),
    [(40, HALF, -1e4), (130, HALF, torch.finfo(HALF).min / 2), (40, FULL, torch.finfo(FULL).min / 2)],
)
def test_padding_by_a_bias_equals_padding_by_a_mask_and_padding_alone_no_mask(size, dtype, hidden):
    qkv, dout = torch.randn(3, size, 3, 1, 16).to(dtype), torch.randn(3, size, 16).to(dtype)
    keep = torch.arange(size) < torch.tensor([[size - 7], [0], [1]])
    bias = torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, hidden)[:, None, None]
    biased = attended(qkv, dout, AttentionMask(bias=bias), p=0.1)
    masked = attended(qkv, dout, AttentionMask(key_mask=keep), p=0.1)
    unmasked = attended(qkv, dout, AttentionMask(), p=0.1)
    for ours, with_mask, without in zip(biased, masked, unmasked, strict=True):
        assert torch.equal(ours[[0, 2]], with_mask[[0, 2]])
        assert torch.equal(ours[1], without[1])


def test_a_bias_that_asks_for_a_gradient_is_refused():
    with pytest.raises(ValueError, match="bias requires a gradient"):
        AttentionMask(bias=torch.zeros(1, 1, 1, 4, requires_grad=True))


def test_segments_of_a_row_equal_the_same_documents_packed():
    lengths = [70, 1, 57]
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None].int()
    qkv, dout = torch.randn(1, 128, 3, 2, 16).half(), torch.randn(1, 128, 32).half()
    borders = torch.tensor([0, 70, 71, 128]).int()
    in_a_row = run(dout, qkv, segment_ids=segments, causal=True)
    packed = run(dout[0], qkv[0], cu_seqlens=borders, max_length=128, causal=True)
    for one, other in zip(in_a_row, packed, strict=True):
        torch.testing.assert_close(one[0], other, rtol=2e-3, atol=2e-3)


def test_more_sequences_than_a_grid_takes_are_refused():
    with pytest.raises(ValueError, match="B=65536 sequences are over 65535"):
        forward(torch.zeros(65536, 1, 3, 1, 16).half())


@pytest.mark.parametrize("size", [65, 129])
def test_strided_inputs_equal_contiguous_ones(size):
    wide = torch.randn(2, size + 3, 3, 2, 32).half()
    qkv = wide[:, 1 : size + 1, :, :, 8:24]
    dout = torch.randn(size, 32, 2).half().permute(2, 0, 1)
    key_mask = (torch.arange(size) % 3 > 0)[None].expand(2, size)
    strided = run(dout, qkv, causal=True, key_mask=key_mask)
    contiguous = run(dout.contiguous(), qkv.contiguous(), causal=True, key_mask=key_mask.contiguous())
    expanded = run(torch.ones(()).half().expand(2, size, 32), qkv, causal=True)
    ones = run(torch.ones(2, size, 32).half(), qkv, causal=True)
    for one, other in zip((*strided, expanded[1]), (*contiguous, ones[1]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("size", "dim"), [(64, 64), (128, 64), (150, 64), (150, 128)])
def test_the_tiles_of_every_device_give_the_same_up_to_rounding(size, dim):
    qkv, dout = torch.randn(1, size, 3, 2, dim).half(), torch.randn(1, size, 2 * dim).half()
    results = []
    for capability in (80, 90):
        tiles = tiles_for(capability, 16, dim, size, limited=True)
        results.append(run(dout, qkv, p=0.1, seed=seed(), site=SITE, causal=True, tiles=tiles))
    torch.testing.assert_close(*results, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("size", [128, 130])
def test_two_runs_give_the_same_bits(size):
    qkv, dout = torch.randn(1, size, 3, 1, 64).half(), torch.randn(1, size, 64).half()
    first, second = (run(dout, qkv, p=0.1, seed=seed(), site=SITE) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("kind", ["lengths", "causal lengths", "bias"])
def test_stochastic_backward_equals_the_deterministic_one_up_to_rounding(kind):
    arguments = {**masks_of(kind, 2, 130), "p": 0.1, "seed": seed(), "site": SITE}
    qkv, dout = torch.randn(2, 130, 3, 1, 16).half(), torch.randn(2, 130, 16).half()
    out, lse = forward(qkv, **arguments)
    gradients = [backward(dout, qkv, out, lse, **arguments, stochastic=stochastic) for stochastic in (False, True)]
    assert (gradients[0] - gradients[1]).double().norm() <= 2e-3 * gradients[0].double().norm()


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")  # in rows of hidden keys, which are set to 0
def test_scores_far_from_zero_stay_finite():
    qkv = torch.randn(1, 140, 3, 1, 16) * 40
    qkv[:, :, 1] = -qkv[:, :, 0].abs()
    qkv[:, :, 0].abs_()  # every score is far below zero, where exp of a masked zero score would overflow
    qkv, dout = qkv.half(), torch.randn(1, 140, 16).half()
    for lengths in (torch.tensor([70]).int(), torch.tensor([129]).int()):
        for size in (100, 140):
            out, dqkv = run(dout[:, :size], qkv[:, :size], lengths=lengths)
            assert out.isfinite().all()
            assert dqkv.isfinite().all()


@triton.jit
def _philox_kernel(counters_ptr, words_ptr, key_ptr, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    c0 = tl.load(counters_ptr + 2 * place).to(tl.uint32)
    c1 = tl.load(counters_ptr + 2 * place + 1).to(tl.uint32)
    r0, r1 = philox_2x32(c0, c1, tl.load(key_ptr).to(tl.uint32))
    tl.store(words_ptr + 2 * place, r0.to(tl.int64))
    tl.store(words_ptr + 2 * place + 1, r1.to(tl.int64))


@pytest.mark.parametrize(("word", "answer"), [(0, [0x257A3673, 0xCD26BE2A]), (0xFFFFFFFF, [0xAB302C4D, 0x3DC9D239])])
def test_random_words_are_those_of_the_authors(word, answer):
    """The known answers of Random123 for philox2x32 with 7 rounds: counter and key of zeros, and of ones."""
    counters = torch.full((2, 2), word, dtype=torch.int64)
    words = torch.empty_like(counters)
    _philox_kernel[(1,)](counters, words, counters, 2)
    assert words.tolist() == [answer, answer]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tile", [(16, 16), (32, 64), (64, 32)])
def test_the_mask_is_the_same_in_every_tile_shape_and_transposed(tile, transposed):
    assert torch.equal(draw_mask(1, 128, 0.3), draw_mask(1, 128, 0.3, tile=tile, transposed=transposed))


def test_decisions_are_independent_and_kept_at_the_promised_rate():
    p, size = 0.3, 256
    mask = draw_mask(4, size, p)
    bound = 4 / math.sqrt(size * size)
    assert abs(mask.mean() - (1 - p)) < bound / 2 * math.sqrt(p * (1 - p))
    centred = (mask - (1 - p)) / math.sqrt(p * (1 - p))
    other_site = (draw_mask(4, size, p, site=SITE + 1) - (1 - p)) / math.sqrt(p * (1 - p))
    assert abs((centred[0] * centred[1]).mean()) < bound
    assert abs((centred[0] * other_site[0]).mean()) < bound
    for shift in (1, 2, 8, 16, 32):  # neighbours share a Philox call eight apart
        for dim in (0, 1):
            assert abs((centred[0] * centred[0].roll(shift, dim)).mean()) < bound
