"""A layer in high precision runs without one file of FP8, and FP8 that comes later changes nothing about it."""

import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from xformer_train.kernels import AttentionMask, LayerConfig, LayerStack, TransformerLayer
from xformer_train.kernels.fp8.linear import DelayedScaling, Float8CurrentScaling, fp8_autocast
from xformer_train.kernels.layers.recomputation import recompute_in_backward

PROGRAM = """
import sys
import torch
from xformer_train.kernels import AttentionMask, LayerConfig, LayerStack, TransformerLayer

for pre_layer_norm in (True, False):
    config = LayerConfig(32, 2, 64, pre_layer_norm=pre_layer_norm)
    layer = TransformerLayer(config)
    layer(torch.randn(2, 5, 32)).sum().backward()
    layer.load_state_dict(layer.state_dict())
    for choice in ("none", "selective", "full"):
        stack = LayerStack(config, 2, activation_checkpointing=choice)
        stack(torch.randn(2, 5, 32, requires_grad=True), AttentionMask(causal=True)).sum().backward()
print([name for name in sys.modules if "fp8" in name and name.startswith("xformer_train")])
"""


def test_layers_and_stacks_in_fp32_import_no_module_of_fp8():
    assert subprocess.check_output([sys.executable, "-c", PROGRAM], text=True) == "[]\n"


def build(seed=3):
    torch.manual_seed(seed)
    return TransformerLayer(
        LayerConfig(32, 2, 64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1)
    )


def gradients(layer, x, run):
    """Output and gradients of run(layer, x), whose backward is called by `run`'s caller."""
    y = run(layer, x)
    return y, lambda: torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])


@pytest.mark.parametrize(
    "run",
    [
        lambda layer, x: layer(x),
        recompute_in_backward,
        lambda layer, x: checkpoint(layer, x, use_reentrant=False),
    ],
    ids=["kept", "recomputed", "torch's checkpoint"],
)
def test_a_plain_pass_stays_plain_though_the_layer_had_passes_in_fp8(run):
    layer, x = build(), torch.randn(3, 7, 32, requires_grad=True)
    expected, backward = gradients(layer, x, run)
    expected_gradients = backward()
    with fp8_autocast():
        assert not torch.equal(layer(x), expected)
    y, backward = gradients(layer, x, run)
    assert torch.equal(y, expected)
    assert all(torch.equal(a, b) for a, b in zip(backward(), expected_gradients, strict=True))


def test_a_plain_pass_is_recomputed_plainly_though_its_first_pass_in_fp8_came_in_between():
    layer, x = build(), torch.randn(3, 7, 32, requires_grad=True)
    _, backward = gradients(layer, x, lambda layer, x: layer(x))
    expected = backward()
    _, backward = gradients(layer, x, recompute_in_backward)
    with fp8_autocast(fp8_recipe=DelayedScaling()):
        layer(x)
    assert all(torch.equal(a, b) for a, b in zip(backward(), expected, strict=True))


def test_fp8_state_is_loaded_by_a_layer_that_never_ran_in_fp8():
    layer, fresh, x = build(), build(4), torch.randn(3, 7, 32)
    for scale in (1.0, 20.0):
        with fp8_autocast(fp8_recipe=DelayedScaling(amax_history_len=3)):
            y = layer(scale * x)
        y.sum().backward()
    state = layer.state_dict()
    assert fresh.load_state_dict(state) == ([], [])
    assert list(fresh.state_dict()) == list(state)
    assert all(torch.equal(fresh.state_dict()[name], tensor) for name, tensor in state.items())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*fp9\.scale"):
        fresh.load_state_dict(state | {"qkv.fp9.scale": torch.ones(3)})


@pytest.mark.parametrize("recipe", [Float8CurrentScaling(), DelayedScaling()], ids=str)
@pytest.mark.parametrize("used", [False, True], ids=["never used", "used"])
def test_a_compiled_layer_takes_part_in_a_region_around_it(recipe, used):
    """Outputs are those without a trace, whether the layer had a pass in FP8 before or not."""
    torch.compiler.reset()
    x, results = torch.randn(3, 7, 32), []
    for wrap in (lambda layer: layer, lambda layer: torch.compile(layer, backend="eager")):
        layer = build()
        if used:
            with fp8_autocast(fp8_recipe=recipe):
                layer(x)
        call = wrap(layer)
        plain = call(x)
        for _ in range(2):
            with fp8_autocast(fp8_recipe=recipe):
                narrow = call(x)
            assert not torch.equal(plain, narrow)
        results.append((plain, narrow, *layer.state_dict().values()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_disabled_region_around_a_stack_changes_nothing():
    torch.manual_seed(3)
    stack, x = LayerStack(LayerConfig(32, 2, 64), 1).eval(), torch.randn(2, 5, 32)
    expected = stack(x, AttentionMask())
    with fp8_autocast(enabled=False):
        assert torch.equal(stack(x, AttentionMask()), expected)
