"""Swapped transformers models against themselves before: outputs, gradients, training and generation."""

import copy
import inspect

import pytest
import torch
import transformers
from helpers.hf_models import cache_of
from helpers.hf_swap import (
    ALL,
    DECODERS,
    SIZES,
    assert_same_bits,
    bits,
    build,
    build_without_dropout,
    close,
    close_gradients,
    decoders,
    inputs,
    logits_of,
    models,
    pretrain_inputs,
    with_gradients,
)
from torch import nn

from xformer_train.recipes.policies import revert, swap
from xformer_train.recipes.policies.catalog.lookup import SHIPPED
from xformer_train.recipes.policies.swapping.fused_layer import _WITHOUT_INFLUENCE, CACHE_NAMES, FusedLayer


def compare(model, given, tokens=None):
    """Outputs and gradients of the model and its swapped self, at the tokens (B, S) alone."""
    stock, expected = with_gradients(model, **given, output_hidden_states=True)
    expected = {name: gradient.clone() for name, gradient in expected.items()}
    assert swap(model) == sum(isinstance(module, FusedLayer) for module in model.modules())
    output, _ = with_gradients(model, **given, output_hidden_states=True)
    tokens = slice(None) if tokens is None else tokens
    close(logits_of(output)[tokens], logits_of(stock)[tokens])
    assert len(output.hidden_states) == len(stock.hidden_states) == 3
    for ours, theirs in zip(output.hidden_states, stock.hidden_states, strict=True):
        close(ours[tokens], theirs[tokens])
    revert(model)
    for name, parameter in model.named_parameters():
        close_gradients(parameter.grad, expected[name], msg=lambda text, name=name: f"{name}: {text}")


@models
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", [None, "right", "left"])
def test_outputs_hidden_states_and_gradients_are_the_stock_models(name, attention, padding):
    given = pretrain_inputs(name, inputs(padding))
    compare(build(name, attn_implementation=attention), given, given["attention_mask"].bool())


def allowed_in_blocks(length=9):
    """Two segments that do not see each other: no key mask, and not causal order."""
    segment = (torch.arange(length) >= 4).long()
    return (segment[:, None] == segment)[None, None].expand(2, 1, -1, -1)


@models
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["bool", "additive", "bias", "bias per head"])
def test_own_masks_of_four_dims_are_honoured(name, attention, kind):
    model = build(name, attn_implementation=attention)
    allowed, heads = allowed_in_blocks(), model.config.num_attention_heads
    masks = {
        "bool": allowed,
        "additive": torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo().min),
        "bias": torch.randn(2, 1, 9, 9, generator=torch.Generator().manual_seed(1)),
        "bias per head": torch.randn(2, heads, 9, 9, generator=torch.Generator().manual_seed(1)),
    }
    given = pretrain_inputs(name, inputs(None)) | {"attention_mask": masks[kind]}
    if kind == "bool" and attention == "eager":  # stock layers add it to the scores
        swap(model)
        with pytest.raises(ValueError, match=r"attention_mask is torch.bool \(2, 1, 9, 9\) .* added to the scores$"):
            model(**given)
        return
    compare(model, given)


@models
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(name, reentrant):
    model = build(name)
    given = pretrain_inputs(name, inputs()) | ({"use_cache": False} if name in DECODERS else {})
    swap(model)
    calls = []
    for module in model.modules():
        if isinstance(module, FusedLayer):
            module.fused.register_forward_pre_hook(lambda *_: calls.append(1))
    model.train()
    torch.manual_seed(0)
    output, expected = with_gradients(model, **given)
    expected = {key: gradient.clone() for key, gradient in expected.items()}
    assert len(calls) == 2
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(0)  # dropout is on
    again, gradients = with_gradients(model, **given)
    assert len(calls) == 6  # once more in backward
    assert torch.equal(again.loss, output.loss)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key], rtol=0, atol=0)


@models
def test_five_steps_of_adamw_have_the_stock_losses_and_come_back(name):
    stock = build_without_dropout(name).train()
    ours = copy.deepcopy(stock)
    swap(ours)
    given = pretrain_inputs(name, inputs())
    losses = []
    for model in (stock, ours):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses.append([])
        for _ in range(5):
            output, _ = with_gradients(model, **given)
            optimizer.step()
            losses[-1].append(output.loss.item())
    close(torch.tensor(losses[1]), torch.tensor(losses[0]))
    assert losses[0][-1] < losses[0][0]
    trained = bits(ours.state_dict())
    revert(ours)
    assert_same_bits(ours.state_dict(), trained)
    # Adam divides by the root of a gradient: rounding moves weights whose gradient is almost 0 by up to a step each time.
    for name_, value in ours.state_dict().items():
        assert (value - stock.state_dict()[name_]).abs().max() < 5 * 1e-3, name_
    close(logits_of(ours.eval()(**given)), logits_of(stock.eval()(**given)), atol=1e-3)


@pytest.mark.parametrize("name", [name for name in SIZES if name != "modernbert"])  # which is refused with dropout
def test_dropout_trains_and_evaluation_is_deterministic(name):
    model = build(name).train()
    swap(model)
    given = pretrain_inputs(name, inputs(rows=4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        output, _ = with_gradients(model, **given)
        optimizer.step()
        losses.append(output.loss.item())
    assert sum(losses[-5:]) < sum(losses[:5])
    assert model(**given).loss != model(**given).loss
    model.eval()
    assert torch.equal(logits_of(model(**given)), logits_of(model(**given)))


@pytest.mark.parametrize("attention_dropout", [0.0, 0.4])
def test_distilbert_drops_nothing_behind_attention(attention_dropout):
    # With an MLP of zeros all that is left of a layer's dropout is that of attention probabilities.
    model = build("distilbert", dropout=0.4, attention_dropout=attention_dropout)
    layer = model.distilbert.transformer.layer[0]
    for parameter in layer.ffn.parameters():
        nn.init.zeros_(parameter)
    swap(model)
    x = torch.randn(2, 9, 15)
    expected = layer.eval()(x)
    assert torch.equal(layer.train()(x), expected) is (attention_dropout == 0)


@decoders
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_greedy_generation_is_the_stock_models(attention, cache, name):
    model = build(name, attn_implementation=attention)
    given = inputs("left")
    del given["labels"]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    options |= {"use_cache": False} if cache == "none" else {"cache_implementation": cache, "disable_compile": True}
    options |= {"return_dict_in_generate": True, "min_new_tokens": 8}
    expected = model.generate(**given, **options)
    swap(model)
    found = model.generate(**given, **options)
    assert torch.equal(found.sequences, expected.sequences)
    close(torch.stack(found.logits), torch.stack(expected.logits))
    beams = {"num_beams": 2, "max_new_tokens": 4, "pad_token_id": 0}
    found = model.generate(**given, **beams)
    revert(model)
    assert torch.equal(found, model.generate(**given, **beams))


WITHOUT_A_CACHE = ("TransformerBlockPolicy", "ModernBertEncoderLayerPolicy")  # of models that are never decoders


@pytest.mark.parametrize("policy", [policy for policy in SHIPPED.values() if policy.family.description])
def test_stock_layers_have_no_argument_that_fused_ones_do_not_know_by_name(policy):
    parameters = inspect.signature(policy.original_layer_class().forward).parameters
    _, first, *others = (name for name, one in parameters.items() if one.kind is not one.VAR_KEYWORD)
    assert first == "hidden_states"
    assert "attention_mask" in others
    assert len(set(CACHE_NAMES) & set(others)) == (policy.__name__ not in WITHOUT_A_CACHE)
    assert ("position_embeddings" in others) is policy.family.description.get("rotary", False)
    refused = {"encoder_hidden_states"}
    assert set(others) <= {"attention_mask", "position_embeddings", *CACHE_NAMES, *_WITHOUT_INFLUENCE} | refused


def test_a_token_behind_a_cached_prefill_has_the_stock_logits_in_fp64():  # of a layer that computes in fp64 throughout
    model = build("gpt2").double()
    ids = inputs(None)["input_ids"]

    def logits():
        return model(ids[:, 8:], **cache_of(model(ids[:, :8]))).logits

    expected = logits()
    swap(model)
    torch.testing.assert_close(logits(), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(logits(), model(ids).logits[:, 8:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_layer_takes_a_cache_under_either_name(name):
    model = build("gpt2").double()
    swap(model)
    layer = model.transformer.h[0]
    x = torch.randn(2, 9, 15, dtype=torch.float64)
    cache = transformers.DynamicCache()
    found = torch.cat([layer(x[:, :8], **{name: cache}), layer(x[:, 8:], **{name: cache})], 1)
    assert cache.get_seq_length() == 9
    torch.testing.assert_close(found, layer(x), rtol=0, atol=1e-12)


@decoders
def test_gradients_flow_into_a_cache(name):
    # What a first part of a text put there, as prefix tuning does.
    model = build(name)
    ids = inputs(None)["input_ids"]
    expected = model(ids[:, 6:], **cache_of(model(ids[:, :6]))).logits
    expected.square().sum().backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    model.zero_grad()
    swap(model)
    found = model(ids[:, 6:], **cache_of(model(ids[:, :6]))).logits
    close(found, expected)
    found.square().sum().backward()
    revert(model)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-4, atol=1e-4)  # of size 10


@pytest.mark.parametrize("name", ["llama", "qwen3", "modernbert"])
def test_positions_of_each_row_turn_its_queries_and_keys(name):
    given = inputs(None)
    rows = torch.stack([torch.arange(9), torch.tensor([0, 1, 5, 6, 7, 30, 2, 2, 11])])
    for positions in (rows, rows[1:]):
        compare(build(name), given | {"position_ids": positions})


def test_scaled_rotary_positions_are_those_that_the_model_gives_its_layers():
    scaling = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
    compare(build("llama", rope_parameters=scaling), inputs(None))


HEADS = [
    ("BertForSequenceClassification", "bert"),
    ("BertForTokenClassification", "bert"),
    ("BertForQuestionAnswering", "bert"),
    ("RobertaForSequenceClassification", "roberta"),
    ("XLMRobertaModel", "xlm_roberta"),
    ("CamembertForTokenClassification", "camembert"),
    ("RobertaPreLayerNormForSequenceClassification", "roberta_prelayernorm"),
    ("ElectraForPreTraining", "electra"),
    ("ElectraForSequenceClassification", "electra"),
    ("DistilBertForQuestionAnswering", "distilbert"),
    ("GPT2ForSequenceClassification", "gpt2"),
    ("GPT2ForTokenClassification", "gpt2"),
    ("GPT2Model", "gpt2"),
    ("LlamaForSequenceClassification", "llama"),
    ("MistralModel", "mistral"),
    ("Qwen3ForTokenClassification", "qwen3"),
    ("ModernBertForSequenceClassification", "modernbert"),
    ("ModernBertModel", "modernbert"),
]


@pytest.mark.parametrize(("model_class", "name"), HEADS)
def test_every_head_keeps_its_outputs(model_class, name):
    cls = getattr(transformers, model_class)
    torch.manual_seed(0)
    model = cls(cls.config_class(**ALL[name].fields | SIZES[name] | {"pad_token_id": 1})).eval()
    given = inputs()
    mask = given["attention_mask"].bool()
    del given["labels"]
    expected = model(**given)
    swap(model)
    found = model(**given)
    assert list(found) == list(expected)
    for key, value in expected.items():
        if torch.is_tensor(value):
            at = mask if value.shape[:2] == mask.shape else slice(None)
            close(found[key][at], value[at])
    tuples = model(**given, return_dict=False)
    assert torch.equal(tuples[0], found[0])


@pytest.mark.parametrize("name", ["bert", "gpt2", "qwen3", "modernbert"])
def test_autocast_computes_in_its_dtype_and_gives_back_the_inputs(name):
    model = build(name).train()
    given = pretrain_inputs(name, inputs())
    expected, _ = with_gradients(model.eval(), **given)
    swap(model)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**given, output_hidden_states=True)
    assert output.hidden_states[1].dtype == torch.float32
    torch.testing.assert_close(output.loss, expected.loss, rtol=2e-2, atol=0)  # of bf16: 8 bits
    output.loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
