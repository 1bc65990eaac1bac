"""The layer where only a GPU can tell: real rounding, races, streams, compiled graphs and captured ones."""

import dataclasses

import pytest
import torch
from helpers.exactness import allowed_error

from xformer_train.kernels import AttentionMask, LayerConfig, TransformerLayer
from xformer_train.kernels.ops.choices import IGNORED
from xformer_train.kernels.ops.loss.cross_entropy import linear_cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HALF, FULL, BRAIN = torch.float16, torch.float32, torch.bfloat16
CONFIG = LayerConfig(256, 4, 1024, pre_layer_norm=False)
TODAY = LayerConfig(
    384,
    6,
    1024,
    hidden_act="silu",
    norm="rms_norm",
    norm_bias=False,
    attention_bias=False,
    mlp_bias=False,
    gated_mlp=True,
    rope_theta=1e4,
)
LAYERS_OF_TODAY = {
    "Llama": dataclasses.replace(TODAY, num_key_value_heads=2),
    "Mistral": dataclasses.replace(
        TODAY, num_attention_heads=4, num_key_value_heads=1, head_dim=128, attention_window=100
    ),
    "Qwen3": dataclasses.replace(TODAY, num_key_value_heads=3, head_dim=128, qk_norm=True),
    "ModernBERT": dataclasses.replace(TODAY, norm="layer_norm", hidden_act="gelu", attention_window=64),
    "odd heads": dataclasses.replace(TODAY, num_key_value_heads=1, head_dim=40, attention_window=5),
}
WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(autouse=True)
def new_tensors_lie_on_the_gpu():
    torch.manual_seed(0)
    with torch.device("cuda"):
        yield


def layer_of(config, dtype):
    """A layer without a bias of 0 or a scale of 1, which could be left out unseen."""
    layer = TransformerLayer(config)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1 if parameter.dim() == 1 else 0.0)
    return layer.to(dtype)


def with_config(layer, dtype=None, **changes):
    """The same weights under another config."""
    other = TransformerLayer(dataclasses.replace(layer.config, **changes)).to(dtype or layer.qkv.weight.dtype)
    other.load_state_dict(layer.state_dict())
    return other


def batch_of(kind, batch, size, width, dtype):
    """Mask, hidden states and gradient of the output; real tokens only have one."""
    lengths = torch.linspace(size, 1, batch).long()
    real = torch.arange(size) < lengths[:, None]
    x, dy = (torch.randn(batch, size, width).to(dtype) for _ in range(2))
    if kind == "packed":
        borders = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        return AttentionMask(cu_seqlens=borders, max_length=size), x[real].requires_grad_(), dy[real]
    if kind == "padded":
        return AttentionMask(key_mask=real), x.requires_grad_(), dy * real[:, :, None]
    return AttentionMask(causal=kind == "causal"), x.requires_grad_(), dy


def step(layer, mask, x, dy):
    """Output, gradient of the input, gradients of the parameters."""
    y = layer(x, mask)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)]


def assert_equal(results, others):
    for one, other in zip(results, others, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("kind", "batch", "size", "heads", "dtype"),
    [
        ("all", 3, 128, 4, BRAIN),
        ("padded", 3, 100, 4, BRAIN),
        ("packed", 4, 200, 4, BRAIN),
        ("causal", 2, 300, 4, BRAIN),
        ("causal", 2, 300, 2, BRAIN),  # heads of 128
        ("padded", 3, 200, 4, HALF),
        ("packed", 3, 100, 4, HALF),
        ("packed", 3, 200, 4, FULL),
        ("causal", 2, 60, 2, FULL),
    ],
)
@pytest.mark.parametrize("pre_layer_norm", [True, False])
def test_the_kernels_are_as_exact_as_torch(kind, batch, size, heads, dtype, pre_layer_norm):
    config = dataclasses.replace(
        CONFIG, num_attention_heads=heads, pre_layer_norm=pre_layer_norm, hidden_act="gelu_tanh", **WITHOUT_DROPOUT
    )
    assert_as_exact_as_torch(config, kind, batch, size, dtype)


def assert_as_exact_as_torch(config, kind, batch, size, dtype):
    """Against fp64, beside the reference path at that dtype."""
    layer = layer_of(config, dtype)
    mask, x, dy = batch_of(kind, batch, size, config.hidden_size, dtype)
    ours = step(layer, mask, x, dy)
    torchs = step(with_config(layer, kernels="reference"), mask, x, dy)
    exact_layer = with_config(layer, torch.float64, kernels="reference")
    exact = step(exact_layer, mask, x.detach().double().requires_grad_(), dy.double())
    names = ["output", "input", *(name for name, _ in layer.named_parameters())]
    for name, mine, theirs, right in zip(names, ours, torchs, exact, strict=True):
        assert (mine.double() - right).norm() <= allowed_error(theirs, right), name


MODEL_BATCHES = [
    ("Llama", "causal", 3, 128),
    ("Llama", "causal", 2, 300),
    ("Mistral", "causal", 2, 300),
    ("Qwen3", "causal", 2, 200),
    ("ModernBERT", "padded", 3, 100),
    ("ModernBERT", "padded", 3, 300),
    ("ModernBERT", "packed", 4, 200),
    ("odd heads", "packed", 3, 130),
]


@pytest.mark.parametrize(("model", "kind", "batch", "size"), MODEL_BATCHES)
@pytest.mark.parametrize("dtype", [BRAIN, HALF, FULL])
def test_layers_of_today_are_as_exact_as_torch(model, kind, batch, size, dtype):
    assert_as_exact_as_torch(dataclasses.replace(LAYERS_OF_TODAY[model], **WITHOUT_DROPOUT), kind, batch, size, dtype)


@pytest.mark.parametrize(("model", "kind", "batch", "size"), MODEL_BATCHES)
def test_layers_of_today_give_equal_bits_for_equal_seeds_in_eager_and_captured_steps(model, kind, batch, size):
    layer = layer_of(LAYERS_OF_TODAY[model], BRAIN)
    inputs = batch_of(kind, 4 * batch, size, layer.config.hidden_size, BRAIN)
    runs = []
    for _ in range(3):
        torch.manual_seed(1)
        runs.append(step(layer, *inputs))
    for other in runs[1:]:
        assert_equal(runs[0], other)
    assert_equal(captured_steps(layer, inputs, 1)[0], runs[0])


def captured_steps(layer, inputs, count):
    """Results of replays of one captured step, drawn from seed 1."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles the kernels, which a capture cannot
            step(layer, *inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(layer, *inputs)
    torch.manual_seed(1)
    replays = []
    for _ in range(count):
        graph.replay()
        replays.append([result.clone() for result in captured])
    return replays


@pytest.mark.parametrize("pre_layer_norm", [True, False])
def test_packed_equals_padded_up_to_rounding(pre_layer_norm):
    """With dropout of the attention only: the other masks count elements, and so differ."""
    config = dataclasses.replace(CONFIG, pre_layer_norm=pre_layer_norm, hidden_dropout_prob=0.0)
    layer = layer_of(config, BRAIN)
    torch.manual_seed(1)
    padded_mask, x, dy = batch_of("padded", 5, 130, config.hidden_size, BRAIN)
    real = padded_mask.key_mask
    torch.manual_seed(1)
    packed_mask, packed_x, packed_dy = batch_of("packed", 5, 130, config.hidden_size, BRAIN)
    torch.manual_seed(2)
    padded = step(layer, padded_mask, x, dy)
    torch.manual_seed(2)
    packed = step(layer, packed_mask, packed_x, packed_dy)
    for one, other in zip([padded[0][real], padded[1][real], *padded[2:]], packed, strict=True):
        assert (one.double() - other.double()).norm() <= 2e-2 * one.double().norm()  # bf16 in another order


@pytest.mark.parametrize("pre_layer_norm", [True, False])
def test_memory_flags_change_no_bit_but_for_the_inverted_norm(pre_layer_norm):
    layer = layer_of(dataclasses.replace(CONFIG, pre_layer_norm=pre_layer_norm), BRAIN)
    batch = batch_of("padded", 4, 130, CONFIG.hidden_size, BRAIN)
    results = []
    for flags in ({}, {"gelu_checkpoint": True, "attn_dropout_checkpoint": True}, {"normalize_invertible": True}):
        torch.manual_seed(1)
        results.append(step(with_config(layer, **flags), *batch))
    plain, recomputed, inverted = results
    assert_equal(plain, recomputed)
    assert torch.equal(plain[0], inverted[0])
    for one, other in zip(plain, inverted, strict=True):
        assert (one.double() - other.double()).norm() <= 2e-2 * one.double().norm()


@pytest.mark.parametrize(
    ("kind", "batch", "size", "heads", "dtype"),
    [
        ("padded", 32, 128, 16, BRAIN),
        ("padded", 8, 512, 16, BRAIN),
        ("packed", 8, 512, 16, HALF),
        ("causal", 4, 1024, 16, BRAIN),
        ("causal", 2, 1000, 8, BRAIN),
        ("all", 2, 300, 16, FULL),
    ],
)
def test_equal_seeds_give_equal_bits(kind, batch, size, heads, dtype):
    """At sizes that fill the GPU, so that blocks finish in another order each time."""
    config = dataclasses.replace(CONFIG, hidden_size=1024, num_attention_heads=heads, intermediate_size=4096)
    layer = layer_of(config, dtype)
    inputs = batch_of(kind, batch, size, config.hidden_size, dtype)
    runs = []
    for _ in range(4):
        torch.manual_seed(1)
        runs.append(step(layer, *inputs))
    for other in runs[1:]:
        assert_equal(runs[0], other)
    assert not torch.equal(runs[0][0], step(layer, *inputs)[0]), "the seed did not move on"


def test_stochastic_mode_is_right_up_to_rounding():
    layer = layer_of(dataclasses.replace(CONFIG, pre_layer_norm=True), BRAIN)
    inputs = batch_of("packed", 4, 512, CONFIG.hidden_size, BRAIN)
    results = []
    for stochastic_mode in (False, True):
        torch.manual_seed(1)
        results.append(step(with_config(layer, stochastic_mode=stochastic_mode), *inputs))
    assert torch.equal(results[0][0], results[1][0])
    for one, other in zip(*results, strict=True):
        assert (one.double() - other.double()).norm() <= 1e-2 * one.double().norm()


@pytest.mark.parametrize("kind", ["padded", "packed", "causal"])
@pytest.mark.parametrize("pre_layer_norm", [True, False])
def test_the_compiled_layer_is_one_graph_and_computes_the_same(kind, pre_layer_norm):
    """Dropout on: with torch's own random numbers the compiled layer draws the same seed, and so the same masks."""
    config = dataclasses.replace(CONFIG, pre_layer_norm=pre_layer_norm, gelu_checkpoint=True)
    layer = layer_of(config, BRAIN)
    inputs = batch_of(kind, 3, 130, config.hidden_size, BRAIN)
    torch.manual_seed(1)
    eager = step(layer, *inputs)
    with torch._inductor.config.patch(fallback_random=True):
        torch.manual_seed(1)
        compiled = step(torch.compile(layer, fullgraph=True), *inputs)
    torch.compiler.reset()
    for one, other in zip(eager, compiled, strict=True):
        assert (one.double() - other.double()).norm() <= 1e-2 * one.double().norm()


@pytest.mark.parametrize("kind", ["all", "padded", "packed", "causal"])
def test_every_replay_of_a_captured_step_equals_an_eager_one_with_its_own_masks(kind):
    layer = layer_of(CONFIG, BRAIN)
    inputs = batch_of(kind, 4, 130, CONFIG.hidden_size, BRAIN)
    replays = captured_steps(layer, inputs, 3)
    torch.manual_seed(1)
    for replay in replays:
        assert_equal(replay, step(layer, *inputs))
    assert not torch.equal(replays[0][0], replays[1][0])


@pytest.mark.parametrize("dtype", [BRAIN, HALF, FULL])
def test_the_loss_over_the_vocabulary_is_as_exact_as_torch(dtype):
    inputs = [torch.randn(301, 128), 0.1 * torch.randn(30528, 128), 0.1 * torch.randn(30528)]
    rounded = [tensor.to(dtype) for tensor in inputs]
    labels = torch.randint(30528, (301,))
    labels[::7] = IGNORED

    def results(dtype, kernels):
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in rounded]
        loss = linear_cross_entropy(*leaves, labels, kernels=kernels)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    ours, torchs, exact = results(dtype, "auto"), results(dtype, "reference"), results(torch.float64, "reference")
    for mine, theirs, right in zip(ours, torchs, exact, strict=True):
        assert (mine.double() - right).norm() <= allowed_error(theirs, right, dtype)  # the loss itself is fp32


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_layer_runs_on_a_device_that_is_not_the_current_one():
    layer, (mask, x, dy) = layer_of(CONFIG, BRAIN), batch_of("causal", 2, 100, CONFIG.hidden_size, BRAIN)
    config = dataclasses.replace(CONFIG, **WITHOUT_DROPOUT)
    here = step(with_config(layer, **WITHOUT_DROPOUT), mask, x, dy)
    there = TransformerLayer(config).to("cuda:1", BRAIN)
    there.load_state_dict(layer.state_dict())
    results = step(there, mask, x.detach().to("cuda:1").requires_grad_(), dy.to("cuda:1"))
    assert_equal(here, [result.to("cuda:0") for result in results])
