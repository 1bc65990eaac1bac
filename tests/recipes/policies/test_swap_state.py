"""What a swapped model keeps: state dicts, objects, hooks, copies; and what revert gives back."""

import copy
import pickle

import pytest
import torch
from helpers.hf_swap import (
    ALL,
    SIZES,
    assert_same_bits,
    bits,
    build,
    close,
    inputs,
    logits_of,
    models,
    pretrain_inputs,
    with_gradients,
)
from helpers.lora import adapt, adapters

from xformer_train.recipes.policies import revert, swap
from xformer_train.recipes.policies.swapping.fused_layer import FusedLayer


def alone(layer):
    """The stock parameters that one of the fused layer's is made of, as it is stored."""
    origins = layer.swapped.origins.items() if isinstance(layer, FusedLayer) else ()
    return [one.names[0] for name, one in origins if len(one.names) == 1 and not one.transposed]


@models
def test_state_dicts_and_revert_are_bit_exact(name, tmp_path):
    model = build(name)
    before = bits(model.state_dict())
    modules = {path: (type(module), list(vars(module))) for path, module in model.named_modules()}
    parameters = dict(model.named_parameters())
    swap(model)
    moved = [f"{path}.{one}" for path, layer in model.named_modules() for one in alone(layer)]
    assert_same_bits(model.state_dict(), before)
    model.save_pretrained(tmp_path)
    assert_same_bits(type(model).from_pretrained(tmp_path).state_dict(), before)
    other = ALL[name].build(5, **SIZES[name])
    swap(other)
    other.load_state_dict(model.state_dict())
    assert_same_bits(other.state_dict(), before)
    revert(other)
    assert_same_bits(other.state_dict(), before)
    assert revert(model) == 2
    assert_same_bits(model.state_dict(), before)
    assert {path: (type(module), list(vars(module))) for path, module in model.named_modules()} == modules
    assert list(parameters) == [name for name, _ in model.named_parameters()]
    for key, parameter in model.named_parameters():
        assert key not in moved or parameter is parameters[key]  # moved, not copied
    assert len(moved) >= 2 * 4
    for parameter in model.parameters():
        assert parameter.is_contiguous()
        assert parameter.untyped_storage().nbytes() == parameter.nbytes


def test_state_dicts_alias_the_parameters_as_stock_ones_do():
    model = build("gpt2")
    swap(model)
    for value in model.state_dict().values():
        value.zero_()
    assert not any(parameter.any() for parameter in model.parameters())


def test_loading_says_what_is_missing_in_the_stock_models_words():
    model = build("bert")
    swap(model)
    state = model.state_dict()
    prefix = "bert.encoder.layer.0.attention.self."
    state[prefix + "key.weight"] = torch.zeros(2, 2)
    del state[prefix + "query.weight"]
    state[prefix + "own.weight"] = torch.zeros(1)
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(state)
    for text in (
        f'Missing key(s) in state_dict: "{prefix}query.weight".',
        f'Unexpected key(s) in state_dict: "{prefix}own.weight".',
        f"{prefix}key.weight is (2, 2), the model has (15, 15)",
    ):
        assert text in str(error.value), str(error.value)
    del state[prefix + "key.weight"], state[prefix + "own.weight"]
    value = torch.randn(15, 15)
    state[prefix + "value.weight"] = value
    query = model.state_dict()[prefix + "query.weight"].clone()
    model.load_state_dict(state, strict=False)
    assert torch.equal(model.state_dict()[prefix + "value.weight"], value)
    assert torch.equal(model.state_dict()[prefix + "query.weight"], query)


def test_hooks_objects_and_classes_stay():
    model = build("bert")
    layer = model.bert.encoder.layer[1]
    cls = type(layer)
    seen = []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    random = torch.get_rng_state()
    swap(model)
    assert torch.equal(torch.get_rng_state(), random)  # no weight was drawn
    assert model.bert.encoder.layer[1] is layer
    assert isinstance(layer, cls)
    assert type(layer).__name__ == cls.__name__  # FSDP and device maps look for it
    model(**inputs())
    assert seen == [(2, 9, 15)]
    handle.remove()
    revert(model)
    assert type(layer) is cls
    with pytest.raises(ValueError, match="is not swapped; there is nothing to revert"):
        revert(model)


def test_a_part_of_a_model_can_be_swapped():
    model = build("bert")
    given = inputs()
    expected = model(**given).prediction_logits
    assert swap(model.bert.encoder.layer[0]) == 1
    assert swap(model.bert.encoder.layer[1]) == 1
    close(model(**given).prediction_logits[given["attention_mask"].bool()], expected[given["attention_mask"].bool()])
    assert revert(model) == 2


@pytest.mark.parametrize("name", ["bert", "gpt2", "qwen3", "modernbert"])
def test_copies_and_pickles_of_swapped_models_work(name):
    model = build(name)
    given = inputs()
    swap(model)
    expected = logits_of(model(**given))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits_of(other(**given)), expected)
        revert(other)
        assert not any(isinstance(module, FusedLayer) for module in other.modules())
        other.set_attn_implementation("eager")
        assert other(**given, output_attentions=True).attentions is not None
    with pytest.raises(ValueError, match="output_attentions"):
        model(**given, output_attentions=True)


def test_models_in_bf16_swap_and_revert():
    model = build("bert").to(torch.bfloat16)
    before = bits(model.state_dict())
    given = inputs()
    expected = model(**given).prediction_logits
    swap(model)
    found = model(**given).prediction_logits
    assert found.dtype == torch.bfloat16
    real = given["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=0.05)  # logits of size 1, 8 bits
    model.float()
    revert(model)
    assert_same_bits(model.to(torch.bfloat16).state_dict(), before)


def test_frozen_layers_stay_frozen():
    model = build("bert")
    model.bert.encoder.layer[0].requires_grad_(False)
    swap(model)
    with_gradients(model, **pretrain_inputs("bert", inputs()))
    assert all(parameter.grad is None for parameter in model.bert.encoder.layer[0].parameters())
    revert(model)
    assert not any(parameter.requires_grad for parameter in model.bert.encoder.layer[0].parameters())
    assert all(parameter.grad is not None for parameter in model.bert.encoder.layer[1].parameters())


@models
def test_adapters_on_fused_layers_are_trained_and_have_names_of_their_own(name):
    model = build(name)
    swap(model)
    given = inputs()
    expected, state = logits_of(model(**given)), model.state_dict()
    fused = [module.fused for module in model.modules() if isinstance(module, FusedLayer)]
    for layer in fused:
        adapt(layer, ("qkv", "output"))
    logits_of(model(**given)).square().sum().backward()
    assert len(adapters(model)) == 8
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapters(model))
    with torch.no_grad():
        for parameter in adapters(model)[1::2]:
            parameter.zero_()
    close(logits_of(model(**given)), expected)
    with torch.autocast("cpu", torch.bfloat16):
        logits_of(model(**given)).sum().backward()
    adapted = model.state_dict()
    assert {key for key in adapted if ".fused." in key and key.endswith((".A", ".B"))}
    model.load_state_dict(adapted)
    with pytest.raises(ValueError, match=r"hold output\.A: adapters, pruning or parametrizations changed"):
        revert(model)
    for layer in fused:
        layer.qkv, layer.output = layer.qkv.base, layer.output.base
    assert_same_bits(model.state_dict(), bits(state))
    assert revert(model) == 2
