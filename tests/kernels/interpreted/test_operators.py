"""The GPU kernels as operators of torch.library: their rules, and the layer traced over them."""

import dataclasses

import pytest
import torch
from saved_activations import count_saved_bytes, saved_activations

from xformer_train.kernels import (
    AttentionMask,
    DeepSpeedTransformerConfig,
    DeepSpeedTransformerLayer,
    LayerConfig,
    TransformerLayer,
)
from xformer_train.kernels.ops.attention import attention
from xformer_train.kernels.ops.mlp import activation
from xformer_train.kernels.ops.norm import head_norm, residual_norm

CONFIG = LayerConfig(16, 2, 24, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2, initializer_range=0.3)


@pytest.fixture(autouse=True)
def _on_triton(monkeypatch):
    for module in (activation, attention, head_norm, residual_norm):
        monkeypatch.setattr(module, "uses_triton", lambda *_: True)


def test_the_kernels_of_a_layer_keep_torchs_rules():
    seed, vector, x = torch.tensor(3), torch.rand(8), torch.randn(5, 8)
    statistic, options = torch.rand(5), (1e-5, 0.3, 2, False, "auto")
    qkv, borders = torch.randn(6, 3, 2, 16), torch.tensor([0, 2, 6], dtype=torch.int32)
    rest = (0.3, 1, None, None, None)  # p and site; all key heads, no rotary, no window
    packed = (None, None, None, borders, seed, 4, True, *rest)
    out, lse = torch.ops.xformer_train.attention_forward(qkv, *packed)
    padded, biased = qkv.unflatten(0, (2, 3)), (None, None, torch.randn(2, 3), None, seed, None, False, *rest)
    padded_out, padded_lse = torch.ops.xformer_train.attention_forward(padded, *biased)
    for name, arguments in (
        ("residual_norm_forward", (x, vector, x + 1, vector, vector, seed, *options)),
        ("residual_norm_backward", (x, x, x, statistic, statistic, vector, vector, vector, seed, *options)),
        ("residual_norm_forward", (x, None, x + 1, vector, None, seed, *options, True, "rms_norm")),
        ("residual_norm_backward", (x, x, x, None, statistic, vector, None, None, seed, *options, False, "rms_norm")),
        ("head_norm_forward", (qkv.flatten(1, 2), torch.rand(16), torch.rand(16), 1e-6, 2, "auto")),
        ("head_norm_backward", (*[qkv.flatten(1, 2)] * 2, torch.rand(6, 4), torch.rand(16), torch.rand(16), 2, "auto")),
        ("residual_add_forward", (x, vector, x + 1, seed, *options)),
        ("residual_add_backward", (x, vector, seed, *options)),
        ("activation_forward", (x, "gelu", False, "auto")),
        ("activation_backward_", (x.clone(), x, "gelu", True, True, "auto")),
        ("activation_forward", (x, "silu", True, "auto")),
        ("gate_backward_", (x[:, :4].clone(), x, "silu", True, True, "auto")),
        ("gate_backward_", (x[:, :4].clone(), x, "relu2", False, False, "auto")),
        ("attention_forward", (qkv, *packed)),
        ("attention_forward", (padded, *biased)),
        ("attention_backward", (out, qkv, out, lse, *packed, False)),
        ("attention_backward", (padded_out, padded, padded_out, padded_lse, *biased, False)),
    ):
        operator = getattr(torch.ops.xformer_train, name).default
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("pre_layer_norm", [True, False])
def test_a_layer_compiles_into_one_graph_over_the_kernels(pre_layer_norm, bias):
    """aot_eager runs the traced graph with the same kernels, so the bits agree, masks of dropout included."""
    config = dataclasses.replace(CONFIG, pre_layer_norm=pre_layer_norm, gelu_checkpoint=True)
    torch.manual_seed(3)
    layer, x = TransformerLayer(config), torch.randn(2, 9, 16)
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(11)
        mask = AttentionMask(bias=torch.randn(2, 1, 1, 9)) if bias else AttentionMask(causal=True)
        leaf = x.clone().requires_grad_()
        y = run(leaf, mask)
        results.append((y, *torch.autograd.grad(y, [leaf, *layer.parameters()], torch.ones_like(y))))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


NO_BIAS = {"norm_bias": False, "attention_bias": False, "mlp_bias": False}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODERNBERT = dataclasses.replace(CONFIG, gated_mlp=True, rope_theta=1e4, attention_window=3, **NO_BIAS, **NO_DROPOUT)
QWEN3 = dataclasses.replace(
    MODERNBERT,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    qk_norm=True,
    norm="rms_norm",
    hidden_act="silu",
    attention_window=None,
)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("config", [MODERNBERT, QWEN3], ids=["modernbert", "qwen3"])
def test_a_layer_of_today_gives_on_the_kernels_what_it_gives_without(config, packed, monkeypatch):
    lengths = torch.tensor([11, 6])
    real = torch.arange(11) < lengths[:, None]
    torch.manual_seed(3)
    layer, x, dy = TransformerLayer(config), torch.randn(2, 11, 16), torch.randn(2, 11, 16) * real[..., None]
    borders = torch.tensor([0, 11, 17], dtype=torch.int32)
    results = []
    for on_triton in (True, False):
        for module in (activation, attention, head_norm, residual_norm):
            monkeypatch.setattr(module, "uses_triton", lambda *_, on=on_triton: on)
        mask = AttentionMask(causal=True, key_mask=real)
        leaf = x.clone().requires_grad_()
        given, gradient = leaf, dy
        if packed:
            mask = AttentionMask(causal=True, cu_seqlens=borders, max_length=11)
            given, gradient = leaf[real], dy[real]
        y = layer(given, mask)
        found = torch.autograd.grad(y, [leaf, *layer.parameters()], gradient)
        results.append((y if packed else y[real], *found))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_deepspeeds_layer_stays_on_the_kernels_with_its_mask(dropout, monkeypatch):
    """Beside the formula it keeps one fp32 value per key, and no tensor of all pairs."""
    options = {"num_hidden_layers": 1, "initializer_range": 0.3}
    config = DeepSpeedTransformerConfig(2, 32, 48, 2, dropout, dropout, **options)
    layer, x = DeepSpeedTransformerLayer(config), torch.randn(2, 40, 32)
    mask = torch.zeros(2, 1, 1, 40)
    mask[1, ..., 30:] = -1e4
    saved = count_saved_bytes(lambda: layer(x.requires_grad_(), mask), layer.parameters())
    formula = saved_activations(layer.config, 2, 40, torch.float32, triton_attention=True)
    assert saved == sum(formula.values()) + 4 * 2 * 40
    ours = layer.eval()(x, mask)
    for module in (activation, attention, head_norm, residual_norm):
        monkeypatch.setattr(module, "uses_triton", lambda *_: False)
    torch.testing.assert_close(ours, layer(x, mask), rtol=1e-4, atol=1e-4)  # fp32, summed in other orders
