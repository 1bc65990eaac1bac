"""All that swap refuses, and how it says so."""

import pytest
import torch
import transformers
from helpers.hf_models import MODELS
from helpers.hf_swap import SIZES, build, inputs
from helpers.own_policies import MODELS_WITH_POLICIES, OpenAIGPTPolicy
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from xformer_train.recipes.policies import policies_for, revert, swap
from xformer_train.recipes.policies.catalog.layer import Description
from xformer_train.recipes.policies.catalog.lookup import SHIPPED
from xformer_train.recipes.policies.sharding.plan import make_plan

BertPolicy, GPT2Policy, GPTNeoXPolicy, Qwen3Policy = (
    SHIPPED[f"transformers.models.{name}"]
    for name in (
        "bert.modeling_bert.BertLayer",
        "gpt2.modeling_gpt2.GPT2Block",
        "gpt_neox.modeling_gpt_neox.GPTNeoXLayer",
        "qwen3.modeling_qwen3.Qwen3DecoderLayer",
    )
)


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
        "supported: layers of self-attention and one MLP, with two norms, of "
        f"{', '.join(sorted(SIZES))}; docs/huggingface.md has the list of options",
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


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("modernbert", {"mlp_dropout": 0.1}, "mlp.drop drops 0.1; its policy describes []"),
        ("modernbert", {"attention_dropout": 0.1}, "attn.out_drop drops 0.1; its policy describes []"),
        ("llama", {"hidden_act": "relu"}, "the activation is 'relu'; it must be gelu, "),
        (
            "llama",
            {"head_dim": 3, "num_key_value_heads": 6},
            "it does not compute on hidden states and positions alone",
        ),
    ],
)
def test_options_of_todays_layers_are_refused(name, fields, message):
    assert message in error_of(build(name, **fields))


def test_todays_layers_that_are_not_as_their_policy_says_are_refused():
    def message(name, change, policy=None):
        model = build(name)
        change(model.model.layers[1])
        return error_of(model, policy)

    wrong = "it computes something else than its policy describes"
    assert "input_layernorm has eps 0.1; its" in message(
        "llama", lambda layer: setattr(layer.input_layernorm, "variance_epsilon", 0.1)
    )
    assert wrong in message("qwen3", lambda layer: setattr(layer.self_attn, "scaling", 0.3))
    assert wrong in message("llama", lambda layer: setattr(layer.mlp, "act_fn", nn.GELU()))
    gemma = type("GemmaRMSNorm", (LlamaRMSNorm,), {"forward": lambda self, x: LlamaRMSNorm.forward(self, x) * 2})
    gemma.__module__ = LlamaRMSNorm.__module__
    assert wrong in message("llama", lambda layer: setattr(layer.input_layernorm, "__class__", gemma))
    own = type("OwnRMSNorm", (LlamaRMSNorm,), {"__module__": "own"})
    said = "input_layernorm is a OwnRMSNorm; it must be an nn.Linear, an RMSNorm of transformers or Conv1D"
    assert said in message("llama", lambda layer: setattr(layer.input_layernorm, "__class__", own))
    renamed = type("Renamed", (Qwen3Policy,), {"window": staticmethod(lambda: "self_attn.reach")})
    assert "self_attn.reach of window does not exist" in message("qwen3", lambda layer: None, renamed)
    cut = "self_attn.q_proj.bias is None, and others of its product are not"
    assert cut in message("llama", lambda layer: layer.self_attn.q_proj.register_parameter("bias", None))


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


def partition(layer):
    """As DeepSpeed marks parameters that it has taken apart."""
    for parameter in layer.parameters():
        parameter.ds_id, parameter.data = 0, torch.empty(0)


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
        (
            lambda layer: layer.output.dense.register_parameter("bias", None),
            "output.dense.bias is None; a fused layer has biases in intermediate and output, or in",
        ),
        (lambda layer: layer.to("meta"), "its parameters are on meta"),
        (partition, "DeepSpeed's ZeRO stage 3 has partitioned its parameters; swap before it does"),
    ],
)
def test_layers_that_are_not_as_their_policy_says_are_refused(change, message):
    assert message in error_of(broken(change))


def test_a_layer_that_returns_a_tuple_is_named():
    model = build("bert")
    for layer in model.bert.encoder.layer:
        cls = type(layer)
        own = type(
            "Tupled", (cls,), {"forward": lambda self, *args, cls=cls, **kwargs: (cls.forward(self, *args, **kwargs),)}
        )
        layer.__class__ = own
    assert "it returns a tuple, not a tensor as layers of transformers 5" in error_of(model)


def test_wrong_use_is_said_in_one_sentence():
    swapped = build("bert")
    swap(swapped)
    layer = swapped.bert.encoder.layer[0]
    flex = build("bert")
    swap(flex)
    flex.config._attn_implementation = "flex_attention"
    partitioned = build("bert")
    swap(partitioned)
    partition(partitioned.bert.encoder.layer[0])
    rotary = build("modernbert").model
    swap(rotary)
    x = torch.randn(2, 9, 15)
    two_caches = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
    wrong = [
        (lambda: swap(swapped), "this BertForPreTraining is swapped already; call revert"),
        (
            lambda: revert(partitioned),
            "ZeRO stage 3 has partitioned this BertForPreTraining; load its gathered weights",
        ),
        (
            lambda: make_plan(swapped, policies_for(swapped), 2),
            "revert.model. brings them back, which shard.model, group. too needs: shard a model first, then swap it",
        ),
        (lambda: layer.attention.self.query, "there is no attention.self: swap.model. made one fused layer"),
        (lambda: layer(x, encoder_hidden_states=x), "encoder_hidden_states was given to a fused BertLayer"),
        (lambda: layer(x, head_mask=torch.ones(3)), "head_mask was given to a fused BertLayer"),
        (lambda: layer(x, position_embeddings=(x, x)), "position_embeddings was given to a fused BertLayer"),
        (
            lambda: rotary.layers[1](x),
            "a fused ModernBertEncoderLayer turns queries and keys, and needs position_embeddings",
        ),
        (lambda: layer(x, torch.ones(2, 9)), r"attention_mask is torch.float32 \(2, 9\) for 2 x 9 tokens"),
        (lambda: layer(x, torch.zeros(2, 1, 9, 9, requires_grad=True) + 1), "bias requires a gradient"),
        (lambda: layer(x, cache=two_caches), "cache is a EncoderDecoderCache, which a fused BertLayer cannot use"),
        (lambda: layer(x, past_key_values=two_caches), "past_key_values is a EncoderDecoderCache, which a fused"),
        (
            lambda: layer(x, cache=transformers.DynamicCache(), past_key_values=two_caches),
            "past_key_values was given to a fused BertLayer, which cannot honour it",
        ),
        (
            lambda: flex.bert.encoder.layer[0](x),
            "attn_implementation is 'flex_attention'; fused layers know the masks of",
        ),
        (lambda: swap(MODELS["bart"].build()), "BartEncoderLayerPolicy does not describe what the layer computes"),
        (lambda: swap(MODELS_WITH_POLICIES["grouped"].build()), "no policy is shipped for Grouped"),
        (lambda: swap(MODELS_WITH_POLICIES["openai"].build(), OpenAIGPTPolicy), "OpenAIGPTPolicy does not describe"),
        (lambda: swap(build("bert"), GPT2Policy), "the model has no GPT2Block, to whose layers the policy applies"),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()
