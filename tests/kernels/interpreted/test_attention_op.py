"""The attention op over its kernels: packed batches, biases of any shape, masks of one row."""

import pytest
import torch
from helpers.attention_kernels import SITE, assert_as_exact_as_torch, run, seed

from xformer_train.kernels.ops.attention import attention as attention_module
from xformer_train.kernels.ops.attention.attention import AttentionMask, attention
from xformer_train.kernels.ops.attention.rotary import rotary_table

HALF, FULL = torch.float16, torch.float32
pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")


def attended(qkv, dout, mask, kernels="auto", p=0.0):
    """Output and gradient of the op."""
    qkv = qkv.detach().requires_grad_()
    out = attention(qkv, mask, p, seed(), SITE, kernels=kernels)
    return out.detach(), torch.autograd.grad(out, qkv, dout)[0]


@pytest.fixture
def kernels_auto_means_triton(monkeypatch):
    monkeypatch.setattr(attention_module, "uses_triton", lambda _, kernels: kernels == "auto")


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


@pytest.mark.usefixtures("kernels_auto_means_triton")
@pytest.mark.parametrize("size", [40, 130])
def test_the_op_hands_key_heads_rotary_and_window_to_the_kernels(size):
    qkv, dout = torch.randn(2, size, 6, 16).half().requires_grad_(), torch.randn(2, size, 64).half()
    pattern = {"key_heads": 1, "rotary": rotary_table(size + 1, 16, 100.0), "window": 9}
    out = attention(qkv, AttentionMask(causal=True), 0.1, seed(), SITE, **pattern)
    (dqkv,) = torch.autograd.grad(out, qkv, dout)
    expected = run(dout, qkv.detach(), **pattern, causal=True, p=0.1, seed=seed(), site=SITE)
    assert torch.equal(out, expected[0])
    assert torch.equal(dqkv, expected[1])


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
