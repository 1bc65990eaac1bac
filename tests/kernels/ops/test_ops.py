"""Each op against plain torch: outputs and every gradient, odd sizes, non-contiguous input."""

import math

import pytest
import torch
import torch.nn.functional as F

from xformer_train.kernels.ops.attention.attention import AttentionMask, attention
from xformer_train.kernels.ops.choices import IGNORED
from xformer_train.kernels.ops.dropout import keep_mask, keep_scale
from xformer_train.kernels.ops.loss.cross_entropy import linear_cross_entropy
from xformer_train.kernels.ops.norm.residual_norm import are_invertible, dropout

SEED = torch.tensor(1234)


def randn(*shape, grad=True):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_keep_mask_keeps_the_promised_share(p):
    n = 1 << 20
    kept = keep_mask(torch.Size([n]), p, SEED, 1).double().mean().item()
    assert abs(kept - (1 - p)) < 4 * math.sqrt(p * (1 - p) / n) + 2**-17
    assert keep_scale(p) == pytest.approx(1 / (1 - p), rel=2e-4)


def test_masks_of_different_sites_and_seeds_are_independent_and_repeatable():
    shape, p = torch.Size([1000, 63]), 0.3
    first = keep_mask(shape, p, SEED, 1)
    assert torch.equal(first, keep_mask(shape, p, SEED, 1))
    for other in (keep_mask(shape, p, SEED, 2), keep_mask(shape, p, SEED + 1, 1)):
        correlation = torch.corrcoef(torch.stack([first.double().flatten(), other.double().flatten()]))[0, 1]
        assert abs(correlation) < 4 / math.sqrt(shape.numel())


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("size", [1, 63])
def test_dropout_equals_its_formula_with_the_same_mask(p, size):
    x = randn(size, 3, 2).transpose(0, 1)
    expected = x * keep_mask(x.shape, p, SEED, 2) * keep_scale(p)
    torch.testing.assert_close(dropout(x, p=p, seed=SEED, site=2), expected)
    assert torch.autograd.gradcheck(lambda a: dropout(a, p=p, seed=SEED, site=2), (x,))


def test_no_seed_means_no_dropout():
    x = randn(5, 7)
    assert dropout(x, p=0.5, seed=None, site=1) is x


@pytest.mark.parametrize(("scale", "dtype", "allowed"), [(0.01, torch.bfloat16, False), (0.01, torch.float32, True)])
def test_the_inversion_guard_depends_on_the_precision(scale, dtype, allowed):
    weight, bias = torch.ones(16), torch.full((16,), 0.1)
    small = weight.clone()
    small[5] = scale
    assert are_invertible([weight, small], [bias, bias], dtype) == [True, allowed]


def test_a_norm_without_a_bias_can_be_inverted_unless_a_weight_is_zero():
    weight, tiny, zero = torch.ones(16), torch.ones(16), torch.ones(16)
    tiny[3], zero[3] = 1e-3, 0.0
    assert are_invertible([weight, tiny, zero], [None] * 3, torch.bfloat16) == [True, True, False]
    assert are_invertible([tiny, tiny], [torch.ones(16), None], torch.bfloat16) == [False, True]


def explicit_attention(qkv, bias, mask):
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    if bias is not None:
        scores = scores + bias
    return ((scores.softmax(-1) * mask) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("recompute", ["nothing", "dropout", "core"])
@pytest.mark.parametrize("kind", ["full", "padding", "causal", "segments", "bias"])
def test_attention_equals_the_explicit_formula(p, recompute, kind):
    batch, size, heads, dim = 2, 7, 3, 5
    qkv = randn(batch, size, 3, heads, dim)
    key_mask = torch.ones(batch, size, dtype=torch.bool)
    key_mask[1, 4:] = False
    segments = torch.tensor([[0, 0, 0, 1, 1, 2, 2]]).expand(batch, size)
    allowed = {
        "full": AttentionMask(),
        "padding": AttentionMask(key_mask=key_mask),
        "causal": AttentionMask(causal=True),
        "segments": AttentionMask(causal=True, segment_ids=segments),
        "bias": AttentionMask(bias=torch.randn(batch, 1, 1, size, dtype=torch.float64)),
    }[kind]
    seed = SEED if p else None
    mask = keep_mask(torch.Size([batch, heads, size, size]), p, SEED, 1) * keep_scale(p) if p else 1.0
    torch.testing.assert_close(
        attention(qkv, allowed, p, seed, 1, recompute=recompute),
        explicit_attention(qkv, allowed.additive(size, qkv), mask),
    )
    if p:
        assert torch.autograd.gradcheck(lambda a: attention(a, allowed, p, seed, 1, recompute=recompute), (qkv,))


@pytest.mark.parametrize(
    ("field", "shape", "legal"),
    [
        ("key_mask", (3, 7), r"\(B or 1, S\)"),
        ("key_mask", (2, 8), r"\(B or 1, S\)"),
        ("key_mask", (2, 1, 1, 7), r"\(B or 1, S\)"),
        ("segment_ids", (2, 6), r"\(B or 1, S\)"),
        ("bias", (2, 7), r"\(B or 1, N or 1, S or 1, S\)"),
        ("bias", (7, 7), r"\(B or 1, N or 1, S or 1, S\)"),
        ("bias", (2, 1, 1, 6), r"\(B or 1, N or 1, S or 1, S\)"),
        ("bias", (2, 2, 1, 7), r"\(B or 1, N or 1, S or 1, S\)"),
    ],
)
def test_a_mask_of_another_size_than_the_batch_is_refused(field, shape, legal):
    """The Triton kernels would read past its end."""
    mask = AttentionMask(**{field: torch.zeros(shape, dtype={"key_mask": torch.bool}.get(field))})
    with pytest.raises(ValueError, match=rf"{field} is .* B=2, S=7, N=3 it must be {legal}"):
        attention(randn(2, 7, 3, 3, 5), mask, 0.0, None, 1)


def test_a_key_mask_of_numbers_is_refused():
    with pytest.raises(ValueError, match=r"key_mask is torch.int64; .*give key_mask.bool\(\)"):
        AttentionMask(key_mask=torch.ones(2, 7, dtype=torch.int64))


def test_a_query_sees_only_what_the_bias_allows():
    segments = torch.tensor([[0, 0, 1, 1]])
    mask = AttentionMask(causal=True, key_mask=torch.tensor([[True, True, True, False]]), segment_ids=segments)
    bias = mask.additive(4, torch.empty(0))
    seen = (bias[0, 0] == 0).int().tolist()
    assert seen == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]]
    assert AttentionMask().additive(4, torch.empty(0)) is None


def test_a_row_without_visible_keys_is_finite():
    qkv = randn(1, 3, 3, 1, 4)
    out = attention(qkv, AttentionMask(key_mask=torch.zeros(1, 3, dtype=torch.bool)), 0.0, None, 1)
    out.sum().backward()
    assert out.isfinite().all()
    assert qkv.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["causal", "packed"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_mask_of_inference_mode_serves_training_too(kind, p):
    """Masks keep what they make, and those of swapped models live on from evaluation to training."""
    borders = torch.tensor([0, 2, 7], dtype=torch.int32)
    mask = {"causal": AttentionMask(causal=True), "packed": AttentionMask(cu_seqlens=borders, max_length=5)}[kind]
    qkv = randn(7, 3, 3, 5) if kind == "packed" else randn(2, 7, 3, 3, 5)
    arguments = (mask, p, SEED if p else None, 1)
    with torch.inference_mode():
        expected = attention(qkv, *arguments)
    out = attention(qkv, *arguments, recompute="core")
    out.sum().backward()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("chunk", [1, 40, 10**9])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_cross_entropy_equals_torch_for_every_chunk_size(chunk, with_bias, monkeypatch):
    monkeypatch.setattr("xformer_train.kernels.ops.loss.cross_entropy._CHUNK_ELEMENTS", chunk)
    hidden, weight = randn(13, 6), randn(11, 6)
    bias = randn(11) if with_bias else None
    labels = torch.randint(0, 11, (13,))
    labels[[2, 5]] = IGNORED
    inputs = [hidden, weight] + ([bias] if with_bias else [])
    ours = linear_cross_entropy(hidden, weight, bias, labels)
    theirs = F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction="sum", ignore_index=IGNORED)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(3 * ours, inputs), torch.autograd.grad(3 * theirs, inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_all_ignored_labels_give_zero_loss_and_zero_gradient():
    hidden, weight = randn(4, 6), randn(11, 6)
    loss = linear_cross_entropy(hidden, weight, None, torch.full((4,), IGNORED))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.abs().max() == 0
    assert weight.grad.abs().max() == 0


@pytest.mark.parametrize("label", [-1, 11])
def test_a_label_of_no_row_is_an_error(label):
    with pytest.raises(RuntimeError, match="out of bounds"):
        linear_cross_entropy(randn(2, 6), randn(11, 6), None, torch.tensor([3, label]))


@pytest.mark.parametrize("shape", [(12,), (13, 1), (1,), (1, 13), ()])
def test_labels_of_another_shape_or_dtype_are_refused(shape):
    hidden, weight = randn(13, 6), randn(11, 6)
    with pytest.raises(ValueError, match=r"labels is torch.int64 .*they must be int64 \(T,\) and \(T, H\)"):
        linear_cross_entropy(hidden, weight, None, torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"labels is torch\.float32"):
        linear_cross_entropy(hidden, weight, None, torch.zeros(13))
    with pytest.raises(ValueError, match=r"hidden \(1, 13, 6\)"), torch.no_grad():
        linear_cross_entropy(hidden[None], weight, None, torch.zeros(1, 13, dtype=torch.int64))


@pytest.mark.parametrize("chunk", [2**20, 2**25])
def test_fp16_gradients_of_the_head_do_not_overflow_where_most_labels_are_one_symbol(chunk, monkeypatch):
    """The row of that symbol sums over 24,576 tokens before the loss is divided by their number."""
    monkeypatch.setattr("xformer_train.kernels.ops.loss.cross_entropy._CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    tokens, vocabulary = 32768, 256
    leaves = torch.randn(tokens, 16) + 4, torch.randn(vocabulary, 16) * 0.05, torch.zeros(vocabulary)
    labels = torch.randint(0, vocabulary, (tokens,))
    labels[: tokens * 3 // 4] = 7
    gradients = []
    for dtype in (torch.float16, torch.float32):
        cast = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        loss = linear_cross_entropy(*cast, labels) * (1024 / tokens)  # a loss scale of 1024
        gradients.append(torch.autograd.grad(loss, cast))
    for half, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(half.float(), exact, rtol=1e-2, atol=1e-2 * exact.abs().max().item())


def test_half_precision_loss_is_within_twice_torchs_own_error():
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32), torch.randn(500, 32)
    labels = torch.randint(0, 500, (64,))
    exact = F.cross_entropy(hidden.double() @ weight.double().t(), labels, reduction="sum")
    half, half_weight = hidden.bfloat16(), weight.bfloat16()
    torchs = F.cross_entropy((half @ half_weight.t()).float(), labels, reduction="sum")
    ours = linear_cross_entropy(half, half_weight, None, labels)
    assert ours.dtype == torch.float32
    assert abs(ours - exact) <= 2 * abs(torchs - exact) + 1e-3
