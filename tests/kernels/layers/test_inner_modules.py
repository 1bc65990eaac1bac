"""What is put on or in the place of the modules inside a layer takes part in what the layer computes."""

import copy
import dataclasses

import pytest
import torch
from helpers.lora import Lora, adapt, adapters
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm
from torch.utils.checkpoint import checkpoint

from xformer_train.kernels import AttentionMask, LayerConfig, LayerStack, TransformerLayer
from xformer_train.kernels.fp8.linear import Float8CurrentScaling, fp8_autocast

CONFIG = LayerConfig(
    24, 3, 40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, layer_norm_eps=1e-5, initializer_range=0.3
)
PROJECTIONS = ("qkv", "attention_output", "intermediate", "output")
NORMS = ("attention_norm", "mlp_norm")


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def layer_of(pre_layer_norm=True, dtype=torch.float64, **flags):
    torch.manual_seed(3)
    layer = TransformerLayer(dataclasses.replace(CONFIG, pre_layer_norm=pre_layer_norm, **flags)).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def batch(dtype=torch.float64):
    torch.manual_seed(5)
    return torch.randn(2, 7, 24, dtype=dtype, requires_grad=True)


def merged(layer):
    """A plain layer with the sums of bases and adapters as its weights, which keep the graph to A and B."""
    plain, weights = layer_of(layer.config.pre_layer_norm), {}
    for name, module in layer.named_children():
        if isinstance(module, Lora):
            weights |= {f"{name}.weight": module.base.weight + module.B @ module.A, f"{name}.bias": module.base.bias}
        else:
            weights |= {f"{name}.{own}": parameter for own, parameter in module.named_parameters()}
    return lambda x, mask=None: torch.func.functional_call(plain, weights, (x, mask))


def trained(module):
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def gradients(y, tensors):
    torch.manual_seed(9)
    return torch.autograd.grad(y, tensors, torch.randn_like(y))


@pytest.mark.parametrize("pre_layer_norm", [True, False])
@pytest.mark.parametrize("names", [*((name,) for name in PROJECTIONS), PROJECTIONS])
def test_low_rank_adapters_add_their_product_and_get_its_gradient(names, pre_layer_norm):
    layer, x = adapt(layer_of(pre_layer_norm), names), batch()
    mask = AttentionMask(causal=True)
    y, expected = layer(x, mask), merged(layer)(x, mask)
    torch.testing.assert_close(y, expected)
    leaves = [x, *trained(layer)]
    assert len(leaves) == 1 + 2 * len(names) + (4 - len(names)) * 2 + 4
    for ours, theirs in zip(gradients(y, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.abs().sum() > 0


@pytest.mark.parametrize("choice", ["none", "selective", "full"])
def test_a_stack_trains_adapters_on_all_its_layers(choice):
    torch.manual_seed(3)
    stack = LayerStack(CONFIG, 2, activation_checkpointing=choice).double()
    adapt(stack, ("qkv", "output"))(batch(), AttentionMask()).square().sum().backward()
    assert len(adapters(stack)) == 8
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapters(stack))


def test_adapters_work_with_dropout_memory_flags_and_recomputation():
    flags = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2, "gelu_checkpoint": True}
    flags |= {"normalize_invertible": True, "attn_dropout_checkpoint": True}
    layer, x = adapt(layer_of(**flags), PROJECTIONS), batch()
    found = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(1)
        found.append(gradients(run(x), [x, *trained(layer)]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_adapters_stay_in_high_precision_beside_products_in_fp8():
    torch.manual_seed(3)
    config = LayerConfig(32, 2, 64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1)
    layer = TransformerLayer(config)
    adapted = adapt(copy.deepcopy(layer), ("qkv", "intermediate"))
    x = torch.randn(3, 16, 32, requires_grad=True)
    with torch.no_grad():
        for name in ("qkv", "intermediate"):
            getattr(adapted, name).A.zero_()
    with fp8_autocast(fp8_recipe=Float8CurrentScaling()):
        y, expected = adapted(x), layer(x)
    assert not torch.equal(y, layer(x))  # the other two products are in FP8
    torch.testing.assert_close(y, expected, rtol=0.1, atol=0.1)
    y.square().sum().backward()
    assert adapted.qkv.B.grad is not None and adapted.qkv.base.fp8 is None and adapted.output.fp8 is not None


@pytest.mark.parametrize("pre_layer_norm", [True, False])
@pytest.mark.parametrize("name", [*NORMS, *PROJECTIONS])
def test_hooks_of_every_kind_run_and_change_what_they_change(name, pre_layer_norm):
    layer, x = layer_of(pre_layer_norm), batch()
    expected, called = layer(x), []
    module = getattr(layer, name)
    handles = [
        module.register_forward_pre_hook(lambda *_: called.append("before")),
        module.register_forward_hook(lambda *_: called.append("behind")),
        module.register_full_backward_hook(lambda *_: called.append("backward")),
    ]
    y = layer(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert called == ["before", "behind", "backward"]
    handles.append(module.register_forward_hook(lambda module, args, output: 2 * output))
    assert not torch.allclose(layer(x), expected)
    for handle in handles:
        handle.remove()
    assert torch.equal(layer(x), expected)
    assert len(called) == 5


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("method", ["prune", "weight_norm", "spectral_norm", "parametrize", "forward", "linear"])
def test_weights_that_something_else_makes_are_used(name, method):
    layer, x = layer_of(), batch()
    module = getattr(layer, name)
    plain = layer_of()
    weight = getattr(plain, name).weight
    if method == "prune":
        prune.l1_unstructured(module, "weight", 0.5)
        made = module.weight_orig * module.weight_mask
    elif method == "weight_norm":
        weight_norm(module)
        with torch.no_grad():
            module.weight_g.mul_(2)
        made = 2 * weight
    elif method == "spectral_norm":
        parametrizations.spectral_norm(module)
        module.eval()  # the power iteration stands still
        made = module.weight
    elif method == "parametrize":
        parametrize.register_parametrization(module, "weight", Doubled())
        made = 2 * weight
    elif method == "forward":
        module.forward = lambda x: nn.functional.linear(x, 2 * module.weight, module.bias)
        made = 2 * weight
    else:
        other = nn.Linear(module.in_features, module.out_features).double()
        other.load_state_dict({"weight": 2 * module.weight, "bias": module.bias})
        setattr(layer, name, other)
        made = 2 * weight
    expected = torch.func.functional_call(plain, {f"{name}.weight": made.detach()}, (x,))
    y = layer(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_hooks_of_deepspeed_leave_the_layer_as_it_is():
    layer, x = layer_of(), batch()
    expected, called = layer(x), []

    def hook(*_):
        called.append(1)

    hook.__module__ = "deepspeed.runtime.zero.parameter_offload"
    for module in layer.children():
        module.register_forward_pre_hook(hook)
    assert layer.called_modules() == ()
    assert torch.equal(layer(x), expected)
    assert called == []


def test_an_adapted_layer_is_traced_into_one_graph_and_a_plain_one_still_is():
    torch._dynamo.reset()
    x = batch()
    for layer in (layer_of(), adapt(layer_of(), ("qkv", "output"))):
        y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        expected = layer(x)
        torch.testing.assert_close(y, expected)
        leaves = trained(layer)
        for ours, theirs in zip(gradients(y, leaves), gradients(expected, leaves), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("place", "name"), [("layer", "layer 1 has hooks,"), ("qkv", "layer 1 has hooks on qkv,")])
def test_hooks_are_refused_where_a_graph_is_replayed(place, name):
    stack = LayerStack(CONFIG, 2, cuda_graph=True)
    module = stack[1] if place == "layer" else stack[1].qkv
    module.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=f"{name} which a replayed CUDA graph would not run"):
        stack(torch.randn(1, 3, 24), AttentionMask())
