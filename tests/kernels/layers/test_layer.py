"""The layer under all its flags."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from xformer_train.kernels import AttentionMask, LayerConfig, TransformerLayer
from xformer_train.kernels.layers.layer import invertible_norms

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


FLAGS = ("normalize_invertible", "gelu_checkpoint", "attn_dropout_checkpoint", "stochastic_mode")
EVERY_CHOICE_OF_FLAGS = [
    dict(zip(FLAGS, values, strict=True)) for values in itertools.product([False, True], repeat=len(FLAGS))
]
PADDING = AttentionMask(key_mask=torch.arange(9) < torch.tensor([[9], [6]]))


def trained_layer_of(config, dtype=torch.float32):
    """A layer that is not fresh: biases are not 0, LayerNorm weights have both signs and magnitudes from 0.1 to 1.5."""
    layer = layer_of(config)
    torch.manual_seed(4)
    with torch.no_grad():
        for linear in (layer.qkv, layer.attention_output, layer.intermediate, layer.output):
            linear.bias.normal_(std=0.1)
        for layer_norm in (layer.attention_norm, layer.mlp_norm):
            magnitude = torch.empty(24).uniform_(math.log(0.1), math.log(1.5)).exp()
            layer_norm.weight.copy_(torch.where(torch.rand(24) < 0.5, -magnitude, magnitude))
            layer_norm.bias.normal_(std=0.5)
    return layer.to(dtype)


def amplification(layer):
    """How much (y - beta) / gamma enlarges an error of y, relative to a normalized input of size 1, at worst."""
    norms = (layer.attention_norm, layer.mlp_norm)
    return max(((n.bias.abs() + n.weight.abs()) / n.weight.abs()).max().item() for n in norms)


def assert_same_bits(first, second):
    for a, b in zip((first[0], *first[1]), (second[0], *second[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("pre_layer_norm", [True, False], ids=["pre", "post"])
@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize(
    "flags", EVERY_CHOICE_OF_FLAGS, ids=lambda flags: "+".join(name for name in FLAGS if flags[name]) or "none"
)
def test_memory_flags_change_neither_output_nor_gradients(pre_layer_norm, hidden_act, flags):
    """Bit for bit, but for the gradients of an inverted LayerNorm.

    Those see the normalized input as x' = (y - beta) / gamma. Forming y rounds twice, recovering x' twice more, so with the
    unit roundoff u = 2**-24 and A = max (|beta| + |gamma|) / |gamma| each x' is off by at most 4 u A max(1, |x'|), a row of
    them by sqrt(2) times that, relative to its norm. The gradient of one LayerNorm has x' in two factors, hence 8 sqrt(2) u A,
    and two LayerNorms 23 u A, relative to the norm of the gradient as it enters. 32 u A leaves room for what else is then
    rounded another way. Over 240 draws of such weights and inputs, with A up to 620, the worst difference was 2.9 u A.
    """
    plain = dataclasses.replace(CONFIG, pre_layer_norm=pre_layer_norm, hidden_act=hidden_act)
    x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(8))
    layer = trained_layer_of(plain)
    expected = run(layer, x, PADDING)
    got = run(trained_layer_of(dataclasses.replace(plain, **flags)), x, PADDING)
    if not flags["normalize_invertible"]:
        assert_same_bits(expected, got)
        return
    assert torch.equal(expected[0], got[0])
    assert any(not torch.equal(a, b) for a, b in zip(expected[1], got[1], strict=True)), "nothing was inverted"
    bound = 32 * 2**-24 * amplification(layer)
    for a, b in zip(expected[1], got[1], strict=True):
        assert (a - b).norm() <= bound * a.norm()


@pytest.mark.filterwarnings("ignore:normalize_invertible")  # the layer says that it keeps the input
@pytest.mark.parametrize("pre_layer_norm", [True, False], ids=["pre", "post"])
@pytest.mark.parametrize("gamma", [0.0, 1e-7])
def test_a_tiny_gamma_turns_the_inversion_off(pre_layer_norm, gamma):
    """1e-7 beside a beta of 0.5 would enlarge rounding errors 5e6-fold, so both LayerNorms keep their inputs: equal bits."""
    config = dataclasses.replace(CONFIG, pre_layer_norm=pre_layer_norm)
    layers = [trained_layer_of(dataclasses.replace(config, normalize_invertible=flag)) for flag in (False, True)]
    for layer in layers:
        with torch.no_grad():
            for layer_norm in (layer.attention_norm, layer.mlp_norm):
                layer_norm.weight[5] = gamma
                layer_norm.bias[5] = 0.5
    x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(8))
    assert_same_bits(*(run(layer, x, PADDING) for layer in layers))


@pytest.mark.filterwarnings("ignore:normalize_invertible")  # the layer says that it keeps the input
def test_layer_norms_in_fp32_are_inverted_only_where_their_bf16_outputs_allow_it():
    layer = layer_of(dataclasses.replace(CONFIG, normalize_invertible=True), torch.bfloat16)
    for layer_norm in (layer.attention_norm, layer.mlp_norm):
        layer_norm.float()
    assert invertible_norms([layer]) == [(True, True)]
    nn.init.constant_(layer.mlp_norm.bias, 10.0)  # eleven times the error of y, beside a weight of 1
    assert invertible_norms([layer]) == [(True, False)]


@pytest.mark.filterwarnings("ignore:normalize_invertible")  # bf16 inverts no weight of 0.1
@pytest.mark.parametrize("pre_layer_norm", [True, False], ids=["pre", "post"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("saving", [False, True])
def test_an_equal_seed_replays_the_same_bits(pre_layer_norm, dtype, saving):
    """Forward and backward, whatever random numbers were drawn in between; another seed gives other gradients."""
    flags = dict.fromkeys(FLAGS[:3], saving)
    layer = trained_layer_of(dataclasses.replace(CONFIG, pre_layer_norm=pre_layer_norm, **flags), dtype)
    x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(8)).to(dtype)
    first = run(layer, x, PADDING)
    other = run(layer, x, PADDING, seed=12)
    assert_same_bits(first, run(layer, x, PADDING))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[1][0], other[1][0])


def test_dropout_follows_the_training_flag():
    layer = layer_of(CONFIG)
    x = torch.randn(2, 9, 24)
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
        ({"norm": "batch_norm"}, "norm='batch_norm' is unknown"),
        ({"norm": "rms_norm"}, "norm_bias=True with norm='rms_norm'"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2 does not divide num_attention_heads=3"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0"),
        ({"head_dim": 7, "rope_theta": 1e4}, "head_dim=7 is odd"),
        ({"hidden_size": 21, "rope_theta": 1e4}, "hidden_size / num_attention_heads=7 is odd"),
        ({"rope_theta": 0.0}, "rope_theta=0.0"),
        ({"attention_window": 0}, "attention_window=0"),
        ({"pre_layer_norm": False, "norm_before_attention": False}, "norm_before_attention=False is for pre-LN"),
    ],
)
def test_impossible_layers_are_refused_with_the_field_and_its_value(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_a_wrong_width_is_refused():
    with pytest.raises(ValueError, match="last dim 25"):
        layer_of(CONFIG)(torch.randn(1, 2, 25))


def test_autocast_to_another_dtype_is_refused():
    layer, x = layer_of(CONFIG), torch.randn(1, 2, 24)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(
            ValueError, match=r"torch.autocast .* from torch.float32 to torch.bfloat16 .*te.TransformerLayer"
        ):
            layer(x)
        assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


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
