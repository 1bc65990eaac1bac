"""Swapped transformers models against themselves before: outputs, gradients, state dicts, and all that is refused."""

import copy
import functools
import pickle

import pytest
import torch
import transformers
from distributed.hf_models import MODELS, VOCABULARY
from distributed.own_policies import MODELS_WITH_POLICIES, OpenAIGPTPolicy
from torch import nn

from xformer_train.kernels.tensor_parallel import ONE_PROCESS
from xformer_train.recipes.policies import policies_for, revert, swap
from xformer_train.recipes.policies.decoders import GPT2Policy, GPTNeoXPolicy
from xformer_train.recipes.policies.encoders import BertPolicy
from xformer_train.recipes.policies.fused_layer import FusedLayer
from xformer_train.recipes.policies.layer_masks import LayerMasks
from xformer_train.recipes.policies.plan import make_plan
from xformer_train.recipes.policies.policy import Description
from xformer_train.recipes.policies.shard import apply_plan

# Three heads of five columns, and an MLP whose width is no multiple of anything.
BERT_SIZES = {"hidden_size": 15, "num_attention_heads": 3, "intermediate_size": 37}
SIZES = {
    "bert": BERT_SIZES,
    "roberta": BERT_SIZES,
    "xlm_roberta": BERT_SIZES,
    "camembert": BERT_SIZES,
    "electra": BERT_SIZES,
    "distilbert": {"dim": 15, "n_heads": 3, "hidden_dim": 37},
    "gpt2": {"n_embd": 15, "n_head": 3, "n_inner": 37},
}
NO_DROPOUT = {
    "distilbert": {"dropout": 0.0, "attention_dropout": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0},
}
BERT_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
models = pytest.mark.parametrize("name", SIZES)
# fp32 sums in another order; values are of size 1.
close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
close_gradients = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-6)


def build(name, **fields):
    return MODELS[name].build(**SIZES[name] | fields)


def build_without_dropout(name, **fields):
    return build(name, **NO_DROPOUT.get(name, BERT_NO_DROPOUT) | fields)


def inputs(padding="right", rows=2, length=9):
    """Ids, mask and labels; labels stand where the prediction comes from a token, in a decoder too."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if padding == "right":
        mask[1, -4:] = 0
    if padding == "left":
        mask[1, :4] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100
    labels[:, 1:].masked_fill_(mask[:, :-1] == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def logits_of(output):
    return output.logits if "logits" in output else output.prediction_logits


def with_gradients(model, **given):
    model.zero_grad()
    output = model(**given)
    loss = output.loss if output.loss is not None else logits_of(output).square().mean()
    loss.backward()
    return output, {name: parameter.grad for name, parameter in model.named_parameters()}


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


def pretrain_inputs(name, given):
    """With the second label of BertForPreTraining, which has no loss without it."""
    labels = torch.arange(len(given["input_ids"])) % 2
    return given | ({"next_sentence_label": labels} if name == "bert" else {})


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
    allowed = allowed_in_blocks()
    masks = {
        "bool": allowed,
        "additive": torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo().min),
        "bias": torch.randn(2, 1, 9, 9, generator=torch.Generator().manual_seed(1)),
        "bias per head": torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1)),
    }
    given = pretrain_inputs(name, inputs(None)) | {"attention_mask": masks[kind]}
    model = build(name, attn_implementation=attention)
    if kind == "bool" and attention == "eager":  # stock layers add it to the scores
        swap(model)
        with pytest.raises(ValueError, match=r"attention_mask is torch.bool \(2, 1, 9, 9\) .* added to the scores$"):
            model(**given)
        return
    compare(model, given)


def seen_by(mask, size=4):
    """(B, S, S) bool: which query sees which key; made of what attention adds to the scores."""
    bias = mask.additive(size, torch.zeros(()))
    return None if bias is None else (bias == 0).expand(-1, -1, size, size)[:, 0]


class Config:
    def __init__(self, attention):
        self._attn_implementation = attention


def test_masks_are_told_apart_by_what_they_say():
    x = torch.zeros(2, 4, 6)
    keys = torch.tensor([[True] * 4, [False, True, True, True]])
    order = torch.ones(4, 4, dtype=torch.bool).tril()
    everyone = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    masks = LayerMasks(Config("sdpa"), causal=True)

    def fields(given, masks=masks, **rest):
        mask = masks.convert(given, x, **rest)
        return mask.causal, mask.key_mask is not None, mask.bias is not None, mask.segment_ids is not None

    # (causal, key_mask, bias, segment_ids): a causal mask is made without S * S numbers, whatever form it came in.
    assert fields(None) == (True, False, False, False)
    assert fields(everyone & order) == (True, False, False, False)
    assert fields(everyone) == (False, False, False, False)
    assert fields(keys[:, None, None] & order) == (True, True, False, False)
    assert fields(keys[:, None, None].expand(2, 1, 4, 4)) == (False, True, False, False)
    assert fields(torch.zeros(2, 1, 4, 4).masked_fill(~order, torch.finfo().min)) == (True, False, False, False)
    assert fields(torch.zeros(2, 1, 4, 4).masked_fill(~order, -1e4)) == (
        False,
        False,
        True,
        False,
    )  # a bias, by its size
    assert fields(torch.full((2, 1, 4, 4), 0.5)) == (False, False, True, False)
    assert fields(everyone & order.flip(0)) == (False, False, True, False)
    mask = masks.convert(torch.full((1, 1, 4, 4), -torch.inf).masked_fill(order, 0.0) + 0, x)
    assert torch.equal(seen_by(mask)[0], order)

    eager = LayerMasks(Config("eager"), causal=True)
    assert fields(None, eager) == (False, False, False, False)  # stock layers then add nothing
    flash = LayerMasks(Config("flash_attention_2"), causal=True)
    assert fields(None, flash) == (True, False, False, False)
    assert torch.equal(seen_by(flash.convert(keys.long(), x)), keys[:, None] & order)
    encoder = LayerMasks(Config("flash_attention_2"), causal=False)
    assert fields(None, encoder) == (False, False, False, False)
    assert torch.equal(seen_by(encoder.convert(keys, x)), keys[:, None].expand(2, 4, 4))
    packed = flash.convert(None, x[:1], torch.tensor([[0, 1, 0, 1]]))
    assert torch.equal(seen_by(packed)[0], order & ~(torch.arange(4)[:, None].ge(2) & torch.arange(4).lt(2)))

    given = keys[:, None, None].expand(2, 1, 4, 4).contiguous()
    first = masks.convert(given, x)
    assert masks.convert(given, x) is first  # for all layers
    given[:, :, :, 2] = False
    assert not masks.convert(given, x).key_mask[:, 2].any()  # not what it was before


def test_masks_over_a_cache_are_those_of_stock_attention():
    q = torch.zeros(1, 3, 2, 5)
    order = torch.tensor([[True, True, True, False], [True, True, True, True]])
    keys = torch.tensor([[False, True, True, True]])
    flash = LayerMasks(Config("flash_attention_2"), causal=True)
    assert torch.equal(flash.over_cache(None, q, 4)[0, 0], order)
    assert torch.equal(flash.over_cache(keys, q, 4)[0, 0], order & keys)
    assert flash.over_cache(None, q[:, :, :1], 4) is None  # one query sees all
    sdpa = LayerMasks(Config("sdpa"), causal=True)
    assert torch.equal(sdpa.over_cache(None, q, 4)[0, 0], torch.ones(2, 4, dtype=torch.bool).tril())
    assert sdpa.over_cache(order[None, None], q, 4).dtype == torch.bool
    assert LayerMasks(Config("eager"), causal=True).over_cache(None, q, 4) is None
    with pytest.raises(ValueError, match=r"attention_mask is torch.bool \(1, 1, 2, 4\) for 1 x 2 tokens and 5 keys"):
        sdpa.over_cache(order[None, None], q, 5)


@models
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(name, reentrant):
    model = build(name)
    given = pretrain_inputs(name, inputs()) | ({"use_cache": False} if name == "gpt2" else {})
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


def bits(state):
    return {name: (tensor.shape, tensor.dtype, tensor.clone()) for name, tensor in state.items()}


def assert_same_bits(state, expected):
    assert list(state) == list(expected)
    for name, tensor in state.items():
        shape, dtype, values = expected[name]
        assert (tensor.shape, tensor.dtype) == (shape, dtype), name
        assert torch.equal(tensor, values), name


@models
def test_state_dicts_and_revert_are_bit_exact(name, tmp_path):
    model = build(name)
    before = bits(model.state_dict())
    modules = {path: (type(module), list(vars(module))) for path, module in model.named_modules()}
    parameters = dict(model.named_parameters())
    swap(model)
    assert_same_bits(model.state_dict(), before)
    model.save_pretrained(tmp_path)
    assert_same_bits(type(model).from_pretrained(tmp_path).state_dict(), before)
    other = MODELS[name].build(5, **SIZES[name])
    swap(other)
    other.load_state_dict(model.state_dict())
    assert_same_bits(other.state_dict(), before)
    revert(other)
    assert_same_bits(other.state_dict(), before)
    assert revert(model) == 2
    assert_same_bits(model.state_dict(), before)
    assert {path: (type(module), list(vars(module))) for path, module in model.named_modules()} == modules
    assert list(parameters) == [name for name, _ in model.named_parameters()]
    kept = sum(parameter is parameters[key] for key, parameter in model.named_parameters())
    assert kept > len(parameters) // 2  # moved, not copied
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


@models
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


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_greedy_generation_is_the_stock_models(attention, cache):
    model = build("gpt2", attn_implementation=attention)
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


def test_gradients_flow_into_a_cache():
    # What a first part of a text put there, as prefix tuning does.
    model = build("gpt2")
    ids = inputs(None)["input_ids"]
    expected = model(ids[:, 6:], past_key_values=model(ids[:, :6]).past_key_values).logits
    expected.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    swap(model)
    found = model(ids[:, 6:], past_key_values=model(ids[:, :6]).past_key_values).logits
    close(found, expected)
    found.square().sum().backward()
    revert(model)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-4)  # of size 10


HEADS = [
    ("BertForSequenceClassification", "bert"),
    ("BertForTokenClassification", "bert"),
    ("BertForQuestionAnswering", "bert"),
    ("RobertaForSequenceClassification", "roberta"),
    ("XLMRobertaModel", "xlm_roberta"),
    ("CamembertForTokenClassification", "camembert"),
    ("ElectraForPreTraining", "electra"),
    ("ElectraForSequenceClassification", "electra"),
    ("DistilBertForQuestionAnswering", "distilbert"),
    ("GPT2ForSequenceClassification", "gpt2"),
    ("GPT2ForTokenClassification", "gpt2"),
    ("GPT2Model", "gpt2"),
]


@pytest.mark.parametrize(("model_class", "name"), HEADS)
def test_every_head_keeps_its_outputs(model_class, name):
    cls = getattr(transformers, model_class)
    torch.manual_seed(0)
    model = cls(cls.config_class(**MODELS[name].fields | SIZES[name] | {"pad_token_id": 1})).eval()
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


def test_hooks_objects_and_classes_stay():
    model = build("bert")
    layer = model.bert.encoder.layer[1]
    cls = type(layer)
    seen = []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    swap(model)
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


@pytest.mark.parametrize("name", ["bert", "gpt2"])
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


def test_attention_weights_are_refused_and_come_back():
    model = build("bert", attn_implementation="eager")
    swap(model)
    for call in (model, model.bert):
        with pytest.raises(
            ValueError, match="fused layers keep no attention probabilities; leave it out, or call revert"
        ):
            call(inputs()["input_ids"], output_attentions=True)
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions=True"):
        model(inputs()["input_ids"])
    model(inputs()["input_ids"], output_attentions=False, output_hidden_states=True)
    revert(model)
    output = model(inputs()["input_ids"], output_hidden_states=True)
    assert len(output.attentions) == 2
    assert len(output.hidden_states) == 3


@pytest.mark.parametrize("name", ["bert", "gpt2"])
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


def described(policy, **fields):
    values = {
        "activation": "gelu_new",
        "layer_norm_eps": 1e-5,
        "pre_layer_norm": True,
        "causal": True,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
    }
    return type("Described", (policy,), {"describe": staticmethod(lambda config: Description(**values | fields))})


def test_a_policy_of_ones_own_is_checked_by_computing_the_layer():
    class NeoXPolicy(described(GPTNeoXPolicy, activation="gelu", hidden_dropout=0.0, attention_dropout=0.0)):
        pass

    model = MODELS["gpt_neox"].build()  # rotary positions, which no parameter tells of
    with pytest.raises(ValueError, match=r"gpt_neox.layers.1: it does not compute on hidden states alone \(TypeError"):
        swap(model, NeoXPolicy)

    wrong_order = type(
        "WrongOrder", (BertPolicy,), {"attn_qkv": classmethod(lambda cls: list(reversed(BertPolicy.attn_qkv())))}
    )
    with pytest.raises(ValueError, match="it computes something else than its policy describes: outputs differ by"):
        swap(build("bert"), wrong_order)
    with pytest.raises(ValueError, match="it computes something else than its policy describes"):
        swap(build("gpt2"), described(GPT2Policy, causal=False))
    with pytest.raises(ValueError, match="it computes something else than its policy describes"):
        swap(build("gpt2"), described(GPT2Policy, activation="gelu"))  # 4.7e-4 from the other at most
    model = build("gpt2")
    assert swap(model, described(GPT2Policy)) == 2


def error_of(model, policy=None):
    before = {path: type(module) for path, module in model.named_modules()}
    with pytest.raises(ValueError, match="cannot be swapped:\n") as error:
        swap(model, policy)
    assert {path: type(module) for path, module in model.named_modules()} == before
    return str(error.value)


def test_everything_that_cannot_be_honoured_comes_in_one_error():
    message = error_of(
        build(
            "gpt2",
            scale_attn_by_inverse_layer_idx=True,
            reorder_and_upcast_attn=True,
            n_inner=None,
            activation_function="relu",
            add_cross_attention=True,
        )
    )
    for text in (
        "transformer.h.0 and 1 more: scale_attn_by_inverse_layer_idx is True; a fused layer can only have False",
        "reorder_and_upcast_attn is True",
        "add_cross_attention is True",
        "the activation is 'relu'; it must be gelu, gelu_python, gelu_new",
        "attn_qkv names 3 projections that the layer has; a fused layer has qkv alone",
        "a fused layer has no place for ln_cross_attn.weight (15,)",
        "supported: layers of self-attention and one MLP, with biases and two LayerNorms, of bert, camembert, distilbert, "
        "electra, gpt2, roberta, xlm_roberta; docs/huggingface.md has the list of options",
    ):
        assert text in message, (text, message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"is_decoder": True}, "is_decoder is True"),
        ({"chunk_size_feed_forward": 2}, "chunk_size_feed_forward is 2"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
    ],
)
def test_options_of_bert_are_refused(fields, message):
    assert message in error_of(build("bert", **fields))


class Adapted(nn.Linear):
    """As an adapter's."""


def broken(change):
    model = build("bert")
    change(model.bert.encoder.layer[1])
    return model


def prune(layer):
    layer.attention.self.query = nn.Linear(15, 10)
    layer.attention.self.num_attention_heads = 2


def scale(layer):
    layer.attention.self.scaling *= 2


def tie(layer):
    layer.output.LayerNorm.weight = layer.attention.output.LayerNorm.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (prune, "attention.self.query.weight is (10, 15); a fused layer needs (15, 15)"),
        (scale, "it computes something else than its policy describes"),
        (tie, "is tied to another parameter"),
        (lambda layer: setattr(layer.output.dense, "__class__", Adapted), "output.dense is a Adapted"),
        (lambda layer: setattr(layer.output.dropout, "p", 0.7), "output.dropout drops 0.7; its policy describes [0.1]"),
        (
            lambda layer: setattr(layer.output.LayerNorm, "eps", 1e-3),
            "output.LayerNorm has eps 0.001; its policy describes",
        ),
        (lambda layer: layer.register_parameter("gate", nn.Parameter(torch.ones(3))), "has no place for gate (3,)"),
        (lambda layer: layer.output.register_buffer("own", torch.ones(3)), "output has buffers"),
        (lambda layer: layer.output.register_forward_hook(print), "output has forward hooks"),
        (lambda layer: layer.output.LayerNorm.double(), "its parameters have dtypes torch.float32, torch.float64"),
        (lambda layer: layer.attention.self.key.requires_grad_(False), "must be frozen together or not at all"),
        (lambda layer: layer.output.dense.register_parameter("bias", None), "output.dense.bias is None"),
        (lambda layer: layer.to("meta"), "its parameters are on meta"),
    ],
)
def test_layers_that_are_not_as_their_policy_says_are_refused(change, message):
    assert f"bert.encoder.layer.1: {message}" in error_of(broken(change)) or message in error_of(broken(change))


def test_a_layer_that_returns_a_tuple_is_named():
    model = build("bert")
    for layer in model.bert.encoder.layer:
        cls = type(layer)
        own = type(
            "Tupled", (cls,), {"forward": lambda self, *args, cls=cls, **kwargs: (cls.forward(self, *args, **kwargs),)}
        )
        layer.__class__ = own
    assert "it returns a tuple; swap knows layers that return a tensor" in error_of(model)


def test_wrong_use_is_said_in_one_sentence():
    swapped = build("bert")
    swap(swapped)
    layer = swapped.bert.encoder.layer[0]
    sharded = build("bert")
    apply_plan(sharded, make_plan(sharded, policies_for(sharded), 1), ONE_PROCESS)
    flex = build("bert")
    swap(flex)
    flex.config._attn_implementation = "flex_attention"
    x = torch.randn(2, 9, 15)
    ids = inputs()["input_ids"]
    wrong = [
        (lambda: swap(swapped), "this BertForPreTraining is swapped already; call revert"),
        (lambda: swap(sharded), "this BertForPreTraining is sharded; swap and shard cannot be combined"),
        (
            lambda: make_plan(swapped, policies_for(swapped), 2),
            "revert.model. brings them back, which shard.model. too needs",
        ),
        (lambda: layer.attention.self.query, "there is no attention.self: swap.model. made one fused layer"),
        (lambda: layer(x, encoder_hidden_states=x), "encoder_hidden_states was given to a fused BertLayer"),
        (lambda: layer(x, head_mask=torch.ones(3)), "head_mask was given to a fused BertLayer"),
        (lambda: layer(x, torch.ones(2, 9)), r"attention_mask is torch.float32 \(2, 9\) for 2 x 9 tokens"),
        (lambda: layer(x, torch.zeros(2, 1, 9, 9, requires_grad=True) + 1), "bias requires a gradient"),
        (
            lambda: swapped(
                ids,
                past_key_values=transformers.EncoderDecoderCache(
                    transformers.DynamicCache(), transformers.DynamicCache()
                ),
            ),
            "past_key_values is a EncoderDecoderCache",
        ),
        (
            lambda: flex.bert.encoder.layer[0](x),
            "attn_implementation is 'flex_attention'; fused layers know the masks of",
        ),
        (lambda: swap(MODELS["bart"].build()), "BartEncoderPolicy does not describe what the layer computes"),
        (lambda: swap(MODELS_WITH_POLICIES["grouped"].build()), "no policy is shipped for Grouped"),
        (lambda: swap(MODELS_WITH_POLICIES["openai"].build(), OpenAIGPTPolicy), "OpenAIGPTPolicy does not describe"),
        (lambda: swap(build("bert"), GPT2Policy), "the model has no GPT2Block, to whose layers the policy applies"),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()
