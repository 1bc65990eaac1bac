"""A LayerStack with activation checkpointing computes what one without computes, to the bit, dropout on."""

import dataclasses
import itertools

import pytest
import torch

from xformer_train.kernels import AttentionMask, LayerConfig, LayerStack
from xformer_train.kernels.fp8.linear import DelayedScaling, Float8CurrentScaling, fp8_autocast
from xformer_train.recipes import RECIPES
from xformer_train.recipes.config import LayerFlags, ModelConfig, ObjectiveConfig
from xformer_train.recipes.recipe import Runtime

CONFIG = LayerConfig(32, 4, 64, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2, initializer_range=0.2)
FLAGS = ("normalize_invertible", "gelu_checkpoint", "attn_dropout_checkpoint")
CHOICES = pytest.mark.parametrize("choice", ["selective", "full"])
LENGTH = 9


def masks():
    """Name -> mask, made afresh, since a mask keeps what the first layer computes of it."""
    key_mask = torch.arange(LENGTH) < torch.tensor([[9], [4]])
    return {
        "none": AttentionMask(),
        "padding": AttentionMask(key_mask=key_mask),
        "causal": AttentionMask(causal=True, segment_ids=(torch.arange(LENGTH) > 5).int().expand(2, -1)),
        "packed": AttentionMask(cu_seqlens=torch.tensor([0, 7, 9], dtype=torch.int32), max_length=LENGTH),
    }


def stack_of(choice, config=CONFIG, **options):
    torch.manual_seed(0)
    return LayerStack(config, 3, activation_checkpointing=choice, **options)


def step(stack, mask="none", run=None, dtype=torch.float32):
    """Output, gradients and the generator's state behind one step."""
    torch.manual_seed(1)
    x = torch.randn((9, 32) if mask == "packed" else (2, LENGTH, 32), dtype=dtype).requires_grad_()
    out = (run or stack)(x, masks()[mask])
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype))
    gradients = {name: parameter.grad for name, parameter in stack.named_parameters()}
    return {"output": out.detach(), "input": x.grad, **gradients, "generator": torch.get_rng_state()}


def assert_equal(ours, expected):
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name


@CHOICES
@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("pre_layer_norm", [True, False], ids=["pre", "post"])
def test_every_gradient_is_the_same(pre_layer_norm, mask, choice):
    config = dataclasses.replace(CONFIG, pre_layer_norm=pre_layer_norm)
    assert_equal(step(stack_of(choice, config), mask), step(stack_of("none", config), mask))


@CHOICES
@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=3)), ids=str)
def test_with_every_memory_flag(flags, choice):
    config = dataclasses.replace(CONFIG, **dict(zip(FLAGS, flags, strict=True)))
    assert_equal(step(stack_of(choice, config)), step(stack_of("none", config)))


@CHOICES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_in_other_dtypes(dtype, choice):
    ours, expected = (step(stack_of(c).to(dtype), dtype=dtype) for c in (choice, "none"))
    assert_equal(ours, expected)


@CHOICES
@pytest.mark.parametrize("recipe", [None, DelayedScaling(amax_history_len=3), Float8CurrentScaling()], ids=str)
def test_fp8_passes_in_regions_of_their_own_before_their_backward_passes(recipe, choice):
    """recipe: of a region around the stack; None: the stack's own. State and gradients after both."""

    def run(choice):
        stack = stack_of(choice, fp8=recipe is None)
        inputs, outputs = [], []
        for amplitude in (1.0, 30.0):
            x = amplitude * torch.randn(2, LENGTH, 32, generator=torch.Generator().manual_seed(3))
            inputs.append(x.requires_grad_())
            with fp8_autocast(enabled=recipe is not None, fp8_recipe=recipe):
                outputs.append(stack(inputs[-1], AttentionMask(causal=True)))
        for out in outputs:
            out.square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in stack.named_parameters()}
        return gradients | {f"input {i}": x.grad for i, x in enumerate(inputs)} | stack.state_dict()

    assert_equal(run(choice), run("none"))


@CHOICES
def test_without_gradients_and_without_dropout(choice):
    stack, expected, x = stack_of(choice).eval(), stack_of("none").eval(), torch.randn(2, LENGTH, 32)
    with torch.no_grad():
        assert torch.equal(stack(x, AttentionMask()), expected(x, AttentionMask()))
    assert_equal(step(stack), step(expected))


@CHOICES
def test_compiled_into_one_graph(choice):
    torch.compiler.reset()  # its limit of recompilations counts those of other tests
    stack = stack_of(choice)
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    ours, expected = step(stack, "causal", compiled), step(stack_of("none"), "causal")
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


@CHOICES
@pytest.mark.parametrize("kind", ["bert", "gpt"])
def test_models_take_it_from_their_runtime(kind, choice):
    config = ModelConfig(
        type=kind, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=64
    )
    objective = ObjectiveConfig(type="mlm" if kind == "bert" else "clm")
    results = []
    for chosen in ("none", choice):
        torch.manual_seed(0)
        runtime = Runtime(activation_checkpointing=chosen)
        model = RECIPES[kind].build_model(config, LayerFlags(), objective, 64, runtime)
        assert model.layers.activation_checkpointing == chosen
        torch.manual_seed(1)
        out = model.layers(torch.randn(2, LENGTH, 32), AttentionMask(causal=True))
        out.square().sum().backward()
        results.append({name: p.grad for name, p in model.layers.named_parameters()})
    assert_equal(results[1], results[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_checkpointing": "block"}, "'block' is unknown; use 'none', 'selective' or 'full'"),
        ({"activation_checkpointing": "full", "cuda_graph": True}, "'full' computes layers again .*turn one off"),
    ],
)
def test_wrong_choices_are_one_clear_error(options, message):
    with pytest.raises(ValueError, match=message):
        LayerStack(CONFIG, 1, **options)
