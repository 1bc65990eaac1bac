"""The precision of rotary position embedding; tests/kernels/te/test_transformer_layer.py has its place in a layer."""

import pytest
import torch

from xformer_train.kernels import te
from xformer_train.kernels.te.rotary import rotate, shared_table


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [8, 6])
def test_a_turn_is_as_precise_as_its_input(dtype, columns):
    """One rounding at the end: fp64 is no more than some of its last bits away, whatever the dtype of the angles."""
    x = torch.randn(5, 2, 3, 8, dtype=dtype)
    angles = te.RotaryPositionEmbedding(columns)(5)
    wide, half = x.double(), columns // 2
    turns = torch.polar(torch.ones(5, 1, half, dtype=torch.float64), angles[:, 0, :, :half].double())
    turned = torch.complex(wide[..., :half], wide[..., half:columns]) * turns[:, None]
    expected = torch.cat([turned.real, turned.imag, wide[..., columns:]], -1)
    ours = rotate(x, angles)
    assert ours.dtype == dtype
    # fp32: four roundings at most
    torch.testing.assert_close(
        ours.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps
    )


def layer_and_input(packed, groups, dtype):
    torch.manual_seed(3)
    layer = te.TransformerLayer(
        48,
        64,
        6,
        num_gqa_groups=groups,
        attention_dropout=0.2,
        hidden_dropout=0.0,
        self_attn_mask_type="padding_causal" if packed else "causal",
        attn_input_format="thd" if packed else "sbhd",
        params_dtype=dtype,
    )
    borders = torch.tensor([0, 3, 9, 16], dtype=torch.int32)
    options = {"cu_seqlens_q": borders, "cu_seqlens_kv": borders, "max_seqlen_q": 7, "max_seqlen_kv": 7}
    x = torch.randn(*((16,) if packed else (9, 2)), 48, dtype=dtype)
    return layer, x, options if packed else {}


def results(layer, x, angles, options):
    torch.manual_seed(5)
    x = x.clone().requires_grad_()
    y = layer(x, rotary_pos_emb=angles, **options)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("groups", [None, 2])
def test_angles_turn_inside_of_attention_as_they_do_before_it(groups, packed, monkeypatch):
    """A clone is a tensor whose two halves nobody knows to be equal."""
    layer, x, options = layer_and_input(packed, groups, torch.float32)
    angles = te.RotaryPositionEmbedding(8)(11)
    before = results(layer, x, angles.clone(), options)
    monkeypatch.setattr("xformer_train.kernels.te.attention.rotate", None)
    inside = results(layer, x, angles, options)
    torch.testing.assert_close(inside, before)


def test_angles_turn_before_attention_where_a_table_of_half_the_columns_does_not_hold_them():
    qkv, whole, part = torch.empty(3, 8), te.RotaryPositionEmbedding(8)(5), te.RotaryPositionEmbedding(6)(5)
    assert shared_table((whole, whole), qkv).shape == (5, 8)
    assert shared_table((part, part), qkv) is None
    assert shared_table((whole, whole.clone()), qkv) is None
    assert shared_table((whole, whole), qkv.double()) is None
    whole[..., 2] += 1
    assert shared_table((whole, whole), qkv) is None


def test_short_angles_are_refused_inside_of_attention_too():
    layer, x, options = layer_and_input(False, None, torch.float32)
    with pytest.raises(ValueError, match=r"rotary_pos_emb is \(8, 1, 1, 8\); it must be .* S of 9 or more"):
        layer(x, rotary_pos_emb=te.RotaryPositionEmbedding(8)(8), **options)
