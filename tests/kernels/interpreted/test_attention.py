"""The attention kernels against the explicit formula in fp64, under the mask that the kernels themselves draw."""

import math
import os

import pytest
import torch
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

from xformer_train.kernels.ops.attention.attention_backward_triton import backward
from xformer_train.kernels.ops.attention.attention_tiles import tiles_for
from xformer_train.kernels.ops.attention.attention_triton import Options, forward
from xformer_train.kernels.ops.dropout import keep_scale

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")
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


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(("size", "dim"), [(64, 64), (128, 64), (150, 64), (150, 128)])
def test_the_tiles_of_every_device_give_the_same_up_to_rounding(size, dim, p):
    qkv, dout = torch.randn(1, size, 3, 2, dim).half(), torch.randn(1, size, 2 * dim).half()
    results = []
    for capability in (80, 90):
        tiles = tiles_for(capability, 16, dim, size, drops=p > 0, limited=True)
        results.append(run(dout, qkv, p=p, seed=seed(), site=SITE, causal=True, tiles=tiles))
    torch.testing.assert_close(*results, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("size", [128, 130])
def test_two_runs_give_the_same_bits(size):
    qkv, dout = torch.randn(1, size, 3, 1, 64).half(), torch.randn(1, size, 64).half()
    first, second = (run(dout, qkv, p=0.1, seed=seed(), site=SITE) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("kind", ["lengths", "causal lengths", "bias"])
def test_stochastic_backward_equals_the_deterministic_one_up_to_rounding(kind):
    options = Options(**masks_of(kind, 2, 130), p=0.1, seed=seed(), site=SITE)
    qkv, dout = torch.randn(2, 130, 3, 1, 16).half(), torch.randn(2, 130, 16).half()
    out, lse = forward(qkv, options)
    gradients = [backward(dout, qkv, out, lse, options, stochastic=stochastic) for stochastic in (False, True)]
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
