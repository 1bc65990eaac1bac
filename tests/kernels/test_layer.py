"""The layer under all its flags."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from xformer_train.kernels import AttentionMask, LayerConfig, TransformerLayer

CONFIG = LayerConfig(
    hidden_size=24,
    num_attention_heads=3,
    intermediate_size=40,
    hidden_dropout_prob=0.2,
    attention_probs_dropout_prob=0.2,
    layer_norm_eps=1e-5,
    initializer_range=0.3,
)


def layer_of(config, dtype=torch.float32):
    torch.manual_seed(3)
    return TransformerLayer(config).to(dtype)


def run(layer, x, mask=None, seed=11):
    torch.manual_seed(seed)
    x = x.detach().clone().requires_grad_()
    y = layer(x, mask)
    torch.manual_seed(5)
    gradients = torch.autograd.grad(y, [x, *layer.parameters()], torch.randn_like(y))
    return y.detach(), gradients


@pytest.mark.parametrize("pre_layer_norm", [True, False])
def test_the_layer_equals_torchs_own_without_dropout(pre_layer_norm):
    config = dataclasses.replace(
        CONFIG, pre_layer_norm=pre_layer_norm, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    ours = layer_of(config, torch.float64)
    theirs = nn.TransformerEncoderLayer(
        24, 3, 40, dropout=0.0, activation="gelu", batch_first=True, norm_first=pre_layer_norm, dtype=torch.float64
    )
    names = {
        "self_attn.in_proj_weight": ours.qkv.weight,
        "self_attn.in_proj_bias": ours.qkv.bias,
        "self_attn.out_proj.weight": ours.attention_output.weight,
        "self_attn.out_proj.bias": ours.attention_output.bias,
        "linear1.weight": ours.intermediate.weight,
        "linear1.bias": ours.intermediate.bias,
        "linear2.weight": ours.output.weight,
        "linear2.bias": ours.output.bias,
        "norm1.weight": ours.attention_norm.weight,
        "norm1.bias": ours.attention_norm.bias,
        "norm2.weight": ours.mlp_norm.weight,
        "norm2.bias": ours.mlp_norm.bias,
    }
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    theirs.load_state_dict({name: value.detach().clone() for name, value in names.items()})
    padding = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    x = torch.randn(2, 7, 24, dtype=torch.float64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    y = ours(x, AttentionMask(key_mask=padding))
    expected = theirs(twin, src_key_padding_mask=~padding)
    torch.testing.assert_close(y[padding], expected[padding])
    dy = torch.randn_like(y) * padding[..., None]
    y.backward(dy)
    expected.backward(dy)
    torch.testing.assert_close(x.grad, twin.grad)
    for name, value in names.items():
        torch.testing.assert_close(value.grad, theirs.get_parameter(name).grad)


@pytest.mark.parametrize("pre_layer_norm", [True, False])
@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=3)))
def test_memory_flags_change_neither_output_nor_gradients(pre_layer_norm, flags):
    plain = dataclasses.replace(CONFIG, pre_layer_norm=pre_layer_norm)
    flagged = dataclasses.replace(
        plain, normalize_invertible=flags[0], gelu_checkpoint=flags[1], attn_dropout_checkpoint=flags[2]
    )
    x = torch.randn(2, 9, 24)
    y, gradients = run(layer_of(plain), x)
    flagged_y, flagged_gradients = run(layer_of(flagged), x)
    assert torch.equal(y, flagged_y)
    # fp32 inversion recovers the normalized input to a few ulp (LayerNorm weights are 1 here); sums over 18 rows follow
    for a, b in zip(gradients, flagged_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4 if flags[0] else 1e-5, atol=1e-5 if flags[0] else 1e-6)


def test_dropout_follows_the_training_flag_and_the_seed():
    layer = layer_of(CONFIG)
    x = torch.randn(2, 9, 24)
    assert torch.equal(run(layer, x)[0], run(layer, x)[0])
    assert not torch.equal(run(layer, x, seed=1)[0], run(layer, x, seed=2)[0])
    layer.eval()
    assert torch.equal(run(layer, x, seed=1)[0], run(layer, x, seed=2)[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_reproduces_the_masks(reentrant):
    layer = layer_of(CONFIG)
    x = torch.randn(2, 9, 24, requires_grad=True)
    torch.manual_seed(1)
    (plain,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.manual_seed(1)
    x.grad = None
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(plain, x.grad)


def test_gradcheck_of_the_whole_layer_with_dropout():
    config = dataclasses.replace(CONFIG, hidden_size=6, intermediate_size=5, gelu_checkpoint=True)
    layer = layer_of(config, torch.float64)
    x = torch.randn(1, 4, 6, dtype=torch.float64, requires_grad=True)
    bias = AttentionMask(causal=True)

    def forward(value):
        torch.manual_seed(7)
        return layer(value, bias)

    assert torch.autograd.gradcheck(forward, (x,))


def test_a_causal_mask_does_not_see_the_future():
    layer = layer_of(CONFIG).eval()
    x = torch.randn(1, 8, 24)
    bias = AttentionMask(causal=True)
    changed = x.clone()
    changed[:, 5:] += 1
    assert torch.equal(layer(x, bias)[:, :5], layer(changed, bias)[:, :5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 5}, "hidden_size=24 is not divisible by num_attention_heads=5"),
        ({"hidden_dropout_prob": -1.0}, "hidden_dropout_prob=-1.0"),
        ({"attention_probs_dropout_prob": 1.0}, "attention_probs_dropout_prob=1.0"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"intermediate_size": 0}, "intermediate_size=0"),
    ],
)
def test_impossible_layers_are_refused_with_the_field_and_its_value(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_a_wrong_width_is_refused():
    with pytest.raises(ValueError, match="last dim 25"):
        layer_of(CONFIG)(torch.randn(1, 2, 25))


def test_projections_to_the_residual_stream_start_smaller_with_depth():
    config = dataclasses.replace(CONFIG, hidden_size=240, num_hidden_layers=8, initializer_range=0.02)
    layer = layer_of(config)
    assert layer.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.output.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)


@pytest.mark.parametrize("pre_layer_norm", [True, False])
def test_the_layer_compiles_into_one_graph_that_computes_the_same(pre_layer_norm):
    """aot_eager runs the traced graph with the same kernels, so the bits agree, masks of dropout included."""
    config = dataclasses.replace(
        CONFIG, pre_layer_norm=pre_layer_norm, gelu_checkpoint=True, attn_dropout_checkpoint=True
    )
    layer, x, mask = layer_of(config), torch.randn(2, 9, 24), AttentionMask(causal=True)
    y, gradients = run(layer, x, mask)
    compiled_y, compiled_gradients = run(torch.compile(layer, fullgraph=True, backend="aot_eager"), x, mask)
    assert torch.equal(y, compiled_y)
    for a, b in zip(gradients, compiled_gradients, strict=True):
        torch.testing.assert_close(a, b)
