"""Packed batches, sequence after sequence without padding, against the same sequences padded."""

import dataclasses

import pytest
import torch

from xformer_train.kernels import AttentionMask, LayerConfig, TransformerLayer
from xformer_train.kernels.ops.attention.attention import attention

SEED, SITE = torch.tensor(1234), 1
HEADS, DIM, SIZE = 3, 5, 9
LENGTHS = torch.tensor([4, 0, 9, 1])
REAL = torch.arange(SIZE) < LENGTHS[:, None]
CONFIG = LayerConfig(
    hidden_size=24,
    num_attention_heads=3,
    intermediate_size=40,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.3,
    initializer_range=0.3,
)


def packed_mask(size=SIZE, causal=False, lengths=LENGTHS):
    borders = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    return AttentionMask(causal=causal, cu_seqlens=borders, max_length=size)


def with_gradient(qkv, mask, dy, p, **options):
    qkv = qkv.clone().requires_grad_()
    out = attention(qkv, mask, p, SEED if p else None, SITE, **options)
    return out.detach(), torch.autograd.grad(out, qkv, dy)[0]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("recompute", ["nothing", "dropout", "core"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_packed_attention_equals_padded_attention_under_the_same_dropout(p, recompute, causal):
    qkv = torch.randn(4, SIZE, 3, HEADS, DIM, dtype=torch.float64)
    dy = torch.randn(4, SIZE, HEADS * DIM, dtype=torch.float64) * REAL[..., None]
    padded_mask = AttentionMask(causal=causal, key_mask=REAL)
    padded = with_gradient(qkv, padded_mask, dy, p, recompute=recompute)
    packed = with_gradient(qkv[REAL], packed_mask(causal=causal), dy[REAL], p, recompute=recompute)
    for one, other in zip(padded, packed, strict=True):
        torch.testing.assert_close(one[REAL], other)


def test_a_max_length_above_the_longest_sequence_changes_nothing_without_dropout():
    qkv, dy = torch.randn(14, 3, HEADS, DIM), torch.randn(14, HEADS * DIM)
    tight, loose = (with_gradient(qkv, packed_mask(size), dy, 0.0) for size in (SIZE, SIZE + 7))
    for one, other in zip(tight, loose, strict=True):
        torch.testing.assert_close(one, other)


def test_gradcheck_of_packed_attention_with_dropout():
    qkv = torch.randn(5, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    mask = packed_mask(4, causal=True, lengths=torch.tensor([2, 3]))
    for recompute in ("dropout", "core"):
        assert torch.autograd.gradcheck(lambda a, r=recompute: attention(a, mask, 0.4, SEED, SITE, recompute=r), (qkv,))


def test_what_is_kept_of_the_projection_is_packed():
    qkv = torch.randn(14, 3, HEADS, DIM, requires_grad=True)
    kept = []

    def pack(tensor):
        kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        attention(qkv, packed_mask(), 0.3, SEED, SITE, recompute="dropout")
    rows, seed = 14 * 8, 8
    assert sorted(kept) == sorted([qkv.nbytes, 4 * HEADS * SIZE * SIZE * 4, rows, seed])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_length": None}, "give both or neither"),
        ({"cu_seqlens": None}, "give both or neither"),
        ({"key_mask": REAL}, "key_mask is for padded batches"),
        ({"segment_ids": REAL.int()}, "segment_ids is for padded batches"),
        ({"bias": torch.zeros(4, 1, 1, SIZE)}, "bias is for padded batches"),
        ({"cu_seqlens": torch.tensor([0, 4])}, r"cu_seqlens is torch.int64 \(2,\); it must be int32"),
        ({"cu_seqlens": torch.tensor([0]).int()}, r"cu_seqlens is torch.int32 \(1,\)"),
        ({"cu_seqlens": torch.tensor([1, 4]).int()}, r"cu_seqlens=\[1, 4\] with max_length=9; it must begin with 0"),
        ({"cu_seqlens": torch.tensor([0, 4, 3]).int()}, r"rise by 0 to max_length"),
        ({"cu_seqlens": torch.tensor([0, 10]).int()}, r"cu_seqlens=\[0, 10\] with max_length=9"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(packed_mask(), **fields)


def test_the_layouts_of_tensor_and_mask_must_agree():
    for shape, mask in (((14, 3, HEADS, DIM), AttentionMask()), ((4, SIZE, 3, HEADS, DIM), packed_mask())):
        with pytest.raises(ValueError, match=r"must be \(T, 3, N, D\) with a mask that has cu_seqlens"):
            attention(torch.randn(shape), mask, 0.0, None, SITE)


def run_layer(layer, x, mask, dy):
    torch.manual_seed(11)
    x = x.detach().clone().requires_grad_()
    y = layer(x, mask)
    return y.detach(), torch.autograd.grad(y, [x, *layer.parameters()], dy)


@pytest.mark.parametrize("flags", [False, True])
@pytest.mark.parametrize("pre_layer_norm", [True, False])
def test_a_layer_computes_the_same_for_packed_and_padded_tokens(pre_layer_norm, flags):
    """fp64, where a guarded inversion of LayerNorm is exact as well. Dropout of attention only: the other masks count rows."""
    names = ("normalize_invertible", "gelu_checkpoint", "attn_dropout_checkpoint")
    config = dataclasses.replace(CONFIG, pre_layer_norm=pre_layer_norm, **dict.fromkeys(names, flags))
    layer = TransformerLayer(config).double()
    x, dy = torch.randn(4, SIZE, 24).double(), torch.randn(4, SIZE, 24).double() * REAL[..., None]
    y, (dx, *gradients) = run_layer(layer, x, AttentionMask(key_mask=REAL), dy)
    packed_y, (packed_dx, *packed_gradients) = run_layer(layer, x[REAL], packed_mask(), dy[REAL])
    torch.testing.assert_close(packed_y, y[REAL])
    torch.testing.assert_close(packed_dx, dx[REAL])
    torch.testing.assert_close(packed_gradients, gradients)


def test_a_packed_layer_compiles_into_one_graph_for_every_number_of_tokens():
    """aot_eager runs the traced graph with the same kernels; a second compilation would raise."""
    layer = TransformerLayer(dataclasses.replace(CONFIG, hidden_dropout_prob=0.2))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in (LENGTHS, torch.tensor([2, 7, 0, 2]), torch.tensor([9, 9, 9, 5])):
        mask = packed_mask(lengths=lengths)
        x, dy = torch.randn(2, int(lengths.sum()), 24)
        y, gradients = run_layer(layer, x, packed_mask(lengths=lengths), dy)
        with torch.compiler.set_stance("default" if lengths is LENGTHS else "fail_on_recompile"):
            compiled_y, compiled_gradients = run_layer(compiled, x, mask, dy)
        assert torch.equal(y, compiled_y)
        torch.testing.assert_close(compiled_gradients, gradients)


@pytest.mark.parametrize("rows", [6, 8])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_rows_that_differ_from_the_last_border_are_refused(rows, p):
    mask = AttentionMask(cu_seqlens=torch.tensor([0, 3, 7], dtype=torch.int32), max_length=4)
    attention(torch.randn(7, 3, 2, 4), mask, p, torch.tensor(1), 1)
    with pytest.raises(ValueError, match=f"cu_seqlens ends with 7, but there are {rows} rows"):
        attention(torch.randn(rows, 3, 2, 4), mask, p, torch.tensor(1), 1)
