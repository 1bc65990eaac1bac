"""Layers of today's kinds against the same written plainly, in fp64: outputs, gradients, every batch and every mode."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from helpers.fp8_linear import sqnr
from torch import nn

from xformer_train.kernels import AttentionMask, LayerConfig, LayerStack, TransformerLayer
from xformer_train.kernels.fp8.linear import fp8_autocast
from xformer_train.kernels.layers.layer import invertible_norms
from xformer_train.kernels.ops.attention import rotary
from xformer_train.kernels.ops.dropout import keep_mask, keep_scale
from xformer_train.kernels.parallel.sharding import join_state_dicts, partitions_of, shard_state_dict

BATCH, LENGTH, HIDDEN = 2, 11, 24
NO_BIAS = {"norm_bias": False, "attention_bias": False, "mlp_bias": False}
COMMON = {
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "layer_norm_eps": 1e-5,
    "initializer_range": 0.3,
}
MODERNBERT = LayerConfig(
    HIDDEN, 4, 20, gated_mlp=True, rope_theta=10_000.0, attention_window=3, **NO_BIAS, **COMMON, hidden_act="gelu"
)
LLAMA = LayerConfig(
    HIDDEN,
    6,
    28,
    hidden_act="silu",
    gated_mlp=True,
    norm="rms_norm",
    num_key_value_heads=2,
    rope_theta=500.0,
    **NO_BIAS,
    **COMMON,
)
CONFIGS = {
    "modernbert": MODERNBERT,
    "modernbert's first": dataclasses.replace(MODERNBERT, norm_before_attention=False, attention_window=None),
    "llama": LLAMA,
    "mistral": dataclasses.replace(LLAMA, attention_window=4),
    "qwen3": dataclasses.replace(LLAMA, head_dim=10, qk_norm=True),
    "post-LN with RMSNorm": dataclasses.replace(LLAMA, pre_layer_norm=False, attention_bias=True, mlp_bias=True),
    "one key head, biases, relu2": dataclasses.replace(
        LLAMA,
        num_key_value_heads=1,
        head_dim=2,
        hidden_act="relu2",
        gated_mlp=False,
        norm="layer_norm",
        norm_bias=True,
        attention_bias=True,
        mlp_bias=True,
    ),
    "key head each, head norms": dataclasses.replace(LLAMA, num_key_value_heads=None, qk_norm=True, rope_theta=None),
}
ALL = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
REAL = torch.arange(LENGTH) < torch.tensor([[LENGTH], [7]])
SEGMENTS = torch.tensor([[0] * 4 + [1] * 7, [0] * 9 + [1] * 2])
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu2": lambda x: F.relu(x).square(),
}
SEED = torch.tensor(77)


def layer_of(config, dtype=torch.float64):
    """A layer that is not fresh, or a bias of 0 or a weight of 1 in the wrong place would go unseen."""
    torch.manual_seed(3)
    layer = TransformerLayer(config)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer.to(dtype)


def input_of(dtype=torch.float64, shape=(BATCH, LENGTH, HIDDEN)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64).to(dtype)


def normed(x, parameters, name, kind, eps):
    if kind == "rms_norm":
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * parameters[f"{name}.weight"]
    return F.layer_norm(x, x.shape[-1:], parameters[f"{name}.weight"], parameters.get(f"{name}.bias"), eps)


def turned(x, theta):
    """x (B, heads, S, D), each pair of columns (i, i + D/2) as one complex number."""
    size = x.shape[-1]
    angles = torch.arange(x.shape[-2]).double()[:, None] * theta ** (-torch.arange(0, size, 2).double() / size)
    first, second = x.chunk(2, -1)
    pairs = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], -1)


def plain_layer(config, parameters, x, seen, seed=None):
    """The layer's output; seen: (B or 1, S, S) bool. Dropout masks are drawn as the ops say they draw them."""

    def projected(x, name):
        return F.linear(x, parameters[f"{name}.weight"], parameters.get(f"{name}.bias"))

    def dropped(x, p, site):
        return x if p == 0 or seed is None else x * keep_mask(x.shape, p, seed, site) * keep_scale(p)

    def norm(x, name):
        return normed(x, parameters, name, config.norm, config.layer_norm_eps)

    def attended(x):
        batch, length, _ = x.shape
        heads, keys, size = (
            config.num_attention_heads,
            config.num_key_value_heads or config.num_attention_heads,
            (config.head_dim or config.hidden_size // config.num_attention_heads),
        )
        q, k, v = projected(x, "qkv").view(batch, length, -1, size).transpose(1, 2).split([heads, keys, keys], 1)
        if config.qk_norm:
            q, k = (
                normed(part, parameters, name, "rms_norm", config.layer_norm_eps)
                for part, name in ((q, "q_norm"), (k, "k_norm"))
            )
        if config.rope_theta is not None:
            q, k = turned(q, config.rope_theta), turned(k, config.rope_theta)
        k, v = (part.repeat_interleave(heads // keys, 1) for part in (k, v))
        scores = (q @ k.transpose(-1, -2) / size**0.5).masked_fill(~seen[:, None], -torch.inf)
        probabilities = dropped(scores.softmax(-1).flatten(0, 1), config.attention_probs_dropout_prob, 1)
        context = probabilities.view_as(scores) @ v
        return dropped(projected(context.transpose(1, 2).flatten(2), "attention_output"), config.hidden_dropout_prob, 2)

    def fed_forward(x):
        f, activation = projected(x, "intermediate"), ACTIVATIONS[config.hidden_act]
        if config.gated_mlp:
            passed, gate = f.chunk(2, -1)
            f = activation(passed) * gate
        else:
            f = activation(f)
        return dropped(projected(f, "output"), config.hidden_dropout_prob, 3)

    if not config.pre_layer_norm:
        x = norm(x + attended(x), "attention_norm")
        return norm(x + fed_forward(x), "mlp_norm")
    x = x + attended(norm(x, "attention_norm") if config.norm_before_attention else x)
    return x + fed_forward(norm(x, "mlp_norm"))


def seen_by(config, mask):
    places = torch.arange(LENGTH)
    seen = torch.ones(1, LENGTH, LENGTH, dtype=torch.bool)
    if config.attention_window is not None:
        seen = seen & ((places[:, None] - places).abs() <= config.attention_window)
    if mask.causal:
        seen = seen & (places[:, None] >= places)
    if mask.key_mask is not None:
        seen = seen & mask.key_mask[:, None]
    if mask.segment_ids is not None:
        seen = seen & (mask.segment_ids[:, :, None] == mask.segment_ids[:, None])
    return seen


def gradients(y, x, parameters, real):
    dy = input_of(y.dtype) * real[..., None]
    return torch.autograd.grad(y, [x, *parameters.values()], dy)


def assert_close(ours, expected, names, tolerance=2e-6):
    """Errors relative to the largest number of each tensor: tables of angles are fp32, so no layer with rope is exact."""
    for name, one, other in zip(names, ours, expected, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance * max(1.0, other.abs().max().item()), rtol=0, msg=name)


MASKS = {
    "all": AttentionMask(),
    "causal": AttentionMask(causal=True),
    "padding": AttentionMask(key_mask=REAL),
    "segments": AttentionMask(causal=True, segment_ids=SEGMENTS),
}


@ALL
@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_outputs_and_gradients_are_those_of_the_formulas(config, mask, p):
    config = dataclasses.replace(config, hidden_dropout_prob=p)
    mask, real = dataclasses.replace(mask, _made={}), REAL if mask.key_mask is not None else torch.ones_like(REAL)
    layer, x = layer_of(config), input_of().requires_grad_()
    y = layer(x, mask, seed=SEED)
    parameters = dict(layer.named_parameters())
    twin = input_of().requires_grad_()
    expected = plain_layer(config, parameters, twin, seen_by(config, mask) | ~real[:, :, None], SEED)
    assert_close([y[real]], [expected[real]], ["output"])
    names = ["input", *parameters]
    assert_close(gradients(y, x, parameters, real), gradients(expected, twin, parameters, real), names)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "modernbert", "post-LN with RMSNorm"])
def test_attention_dropout_drops_what_the_formulas_do(name):
    config = dataclasses.replace(CONFIGS[name], attention_probs_dropout_prob=0.3)
    layer, x = layer_of(config), input_of().requires_grad_()
    parameters, everything = dict(layer.named_parameters()), torch.ones_like(REAL)
    y = layer(x, AttentionMask(causal=True), seed=SEED)
    twin = input_of().requires_grad_()
    expected = plain_layer(config, parameters, twin, seen_by(config, AttentionMask(causal=True)), SEED)
    assert_close([y], [expected], ["output"])
    names = ["input", *parameters]
    assert_close(gradients(y, x, parameters, everything), gradients(expected, twin, parameters, everything), names)


@ALL
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_a_packed_batch_gives_what_its_padded_one_does(config, causal, p):
    """With dropout of attention alone, which decides by the place in the padded batch."""
    layer = layer_of(dataclasses.replace(config, attention_probs_dropout_prob=p))
    parameters = dict(layer.named_parameters())
    borders = torch.tensor([0, LENGTH, LENGTH + 7], dtype=torch.int32)
    x = input_of().requires_grad_()
    padded = layer(x, AttentionMask(causal=causal, key_mask=REAL), seed=SEED)
    packed = layer(x[REAL], AttentionMask(causal=causal, cu_seqlens=borders, max_length=LENGTH), seed=SEED)
    torch.testing.assert_close(packed, padded[REAL])
    dy = input_of()[REAL]
    for name, one, other in zip(
        ["input", *parameters],
        torch.autograd.grad(packed, [x, *parameters.values()], dy),
        torch.autograd.grad(padded[REAL], [x, *parameters.values()], dy),
        strict=True,
    ):
        torch.testing.assert_close(one, other, msg=name)


FLAGS = ("gelu_checkpoint", "attn_dropout_checkpoint")


@ALL
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_what_is_computed_again_gives_the_same_bits(config, p):
    config = dataclasses.replace(config, hidden_dropout_prob=p, attention_probs_dropout_prob=p)

    def step(choice, **flags):
        torch.manual_seed(3)
        configs = [dataclasses.replace(config, **flags), dataclasses.replace(config, attention_window=2, **flags)]
        stack, x = LayerStack(configs, activation_checkpointing=choice), input_of(torch.float32).requires_grad_()
        torch.manual_seed(5)
        y = stack(x, AttentionMask(causal=True))
        return [y, *torch.autograd.grad(y, [x, *stack.parameters()], torch.ones_like(y))]

    plain = step("none")
    for choice, flags in (("selective", {}), ("full", {}), ("none", dict.fromkeys(FLAGS, True))):
        for one, other in zip(plain, step(choice, **flags), strict=True):
            assert torch.equal(one, other)


@ALL
def test_norms_are_inverted_where_their_weights_allow_it(config):
    layers = [layer_of(dataclasses.replace(config, normalize_invertible=flag)) for flag in (False, True)]
    assert invertible_norms(layers)[1] == (config.norm_before_attention, True)
    found = []
    for layer in layers:
        x = input_of().requires_grad_()
        y = layer(x)
        found.append([y, *torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))])
    assert torch.equal(found[0][0], found[1][0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["modernbert", "llama", "qwen3"])
def test_a_hooked_module_computes_for_itself(name):
    config = CONFIGS[name]
    layer, x = layer_of(config), input_of()
    expected, called = layer(x), []
    for inner in [inner for inner, module in layer.named_children() if not isinstance(module, nn.Identity)]:
        handle = layer.get_submodule(inner).register_forward_hook(lambda *_, inner=inner: called.append(inner))
        torch.testing.assert_close(layer(x), expected)
        assert called == [inner]
        handle.remove()
        called.clear()


@pytest.mark.parametrize("name", ["modernbert", "mistral", "qwen3"])
def test_a_layer_compiles_into_one_graph(name):
    config = dataclasses.replace(CONFIGS[name], hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    layer, x = layer_of(config, torch.float32), input_of(torch.float32)
    mask = AttentionMask(causal=True)
    expected = layer(x, mask, seed=SEED)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, AttentionMask(causal=True), seed=SEED), expected)


@pytest.mark.parametrize("gated", [False, True])
def test_fp8_is_near_fp32_and_not_equal(gated):
    config = dataclasses.replace(
        LLAMA,
        hidden_size=64,
        num_attention_heads=4,
        intermediate_size=96,
        gated_mlp=gated,
        qk_norm=True,
        initializer_range=0.05,
    )
    torch.manual_seed(3)
    layer, found = TransformerLayer(config), []
    for enabled in (False, True):
        x = input_of(torch.float32, (BATCH, LENGTH, 64)).requires_grad_()
        with fp8_autocast(enabled):
            y = layer(x, AttentionMask(causal=True))
        found.append([y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))])
    noise = [sqnr(one, other) for one, other in zip(*found, strict=True)]
    assert 20 < noise[0] < 60
    assert min(noise[1:]) > 12, noise


def test_a_table_of_angles_is_made_once_for_the_layers_of_a_pass_with_one_theta(monkeypatch):
    made = []

    def rotary_table(length, dim, theta, device):
        made.append((length, dim, theta))
        return rotary.rotary_table(length, dim, theta, device)

    monkeypatch.setattr("xformer_train.kernels.layers.parts.rotary_table", rotary_table)
    wide = dataclasses.replace(MODERNBERT, rope_theta=160_000.0, attention_window=None)
    stack = LayerStack([wide, MODERNBERT, MODERNBERT, wide])
    stack(input_of(torch.float32), AttentionMask())
    assert made == [(LENGTH, 6, 160_000.0), (LENGTH, 6, 10_000.0)]


def test_a_stack_of_kinds_is_its_layers_in_order():
    configs = [CONFIGS["modernbert's first"], MODERNBERT, LLAMA]
    torch.manual_seed(3)
    stack = LayerStack(configs)
    torch.manual_seed(3)
    layers, hidden = [TransformerLayer(config) for config in configs], input_of(torch.float32)
    expected = hidden
    for layer in layers:
        expected = layer(expected, AttentionMask())
    assert torch.equal(stack(hidden, AttentionMask()), expected)
    assert "0.attention_norm.weight" not in stack.state_dict()
    assert "0.qkv.bias" not in stack.state_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([LLAMA, dataclasses.replace(LLAMA, hidden_size=48)],), r"hidden_size differs between layers, \[24, 48\]"),
        (([LLAMA], 2), "depth=2 with 1 configs"),
        ((LLAMA,), "depth is not given"),
    ],
)
def test_a_stack_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LayerStack(*arguments)


@pytest.mark.parametrize("name", ["modernbert", "qwen3"])
def test_a_state_dict_is_divided_by_heads_and_by_halves_of_a_gate(name):
    layer = layer_of(CONFIGS[name])
    full, cuts = layer.state_dict(), partitions_of(layer)
    config, size = layer.config, layer.config.head_size
    shards = [shard_state_dict(full, cuts, rank, 2) for rank in range(2)]
    queries, keys, values = shards[1]["qkv.weight"].split([part // 2 for part in config.qkv_parts])
    heads = full["qkv.weight"].unflatten(0, (-1, size))
    first_key = config.num_attention_heads
    assert torch.equal(queries, heads[first_key // 2 : first_key].flatten(0, 1))
    share = config.key_heads // 2
    assert torch.equal(keys, heads[first_key + share : first_key + 2 * share].flatten(0, 1))
    assert torch.equal(values, heads[first_key + 3 * share :].flatten(0, 1))
    passed, gate = shards[0]["intermediate.weight"].chunk(2)
    width = config.intermediate_size
    assert torch.equal(passed, full["intermediate.weight"][: width // 2])
    assert torch.equal(gate, full["intermediate.weight"][width : width + width // 2])
    for path, tensor in join_state_dicts(shards, cuts).items():
        assert torch.equal(tensor, full[path]), path
