"""Policies held against models, without processes: what they find, and every error."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from helpers.hf_models import MODELS
from helpers.own_policies import MODELS_WITH_POLICIES, GroupedPolicy, OpenAIGPTPolicy, PlainGate
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from xformer_train.kernels.parallel.collectives import ONE_PROCESS
from xformer_train.kernels.parallel.sharding import Partition
from xformer_train.recipes.policies import Layer, Policy, parallelize, policies_for, shard, swap
from xformer_train.recipes.policies.catalog.lookup import SHIPPED
from xformer_train.recipes.policies.catalog.paths import ABSENT, find, missing
from xformer_train.recipes.policies.catalog.shipped_policy import paths
from xformer_train.recipes.policies.sharding.parallelize import Portable
from xformer_train.recipes.policies.sharding.plan import make_plan
from xformer_train.recipes.policies.sharding.sequence import check_sequence_parallel
from xformer_train.recipes.policies.sharding.shard import apply_plan

BERT = SHIPPED["transformers.models.bert.modeling_bert.BertLayer"]


def change(policy, **methods):
    """The policy with other static methods."""
    return type(
        "Changed", (policy,), {name: staticmethod(lambda *_, value=value: value) for name, value in methods.items()}
    )


def grouped():
    return MODELS_WITH_POLICIES["grouped"].build()


def error_of(model, policies, size=2):
    with pytest.raises(ValueError, match="cannot be sharded over") as error:
        make_plan(model, policies, size)
    return str(error.value)


def test_importing_policies_does_not_import_transformers():
    program = "import sys, xformer_train.recipes.policies; print('transformers' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "False\n"


def test_paths_go_through_attributes_and_lists():
    model = grouped()
    assert find(model, "blocks[1].mlp[2].weight") == ("blocks.1.mlp.2.weight", model.blocks[1].mlp[2].weight)
    assert find(model, "blocks[-1].mlp[-3].weight") == ("blocks.1.mlp.0.weight", model.blocks[1].mlp[0].weight)
    assert find(model, "blocks[7].mlp[2].weight") == ("blocks.7", ABSENT)
    assert find(model, "blocks[-7].mlp[2].weight") == ("blocks.-5", ABSENT)
    assert missing(model, "blocks[1].qkw.weight") == (
        "blocks[1].qkw.weight does not exist, did you mean blocks.1.qkv.weight?"
    )
    assert missing(model, "entirely.else") == "entirely.else does not exist"


def test_texts_of_shipped_policies_name_several_paths():
    assert paths("a.{b,c}[{0,1}] d*3?") == [
        *((f"a.{name}[{index}]", None, False) for name in "bc" for index in (0, 1)),
        ("d", 3, True),
    ]


@pytest.mark.parametrize(("cls", "policy"), SHIPPED.items())
def test_classes_of_shipped_policies_exist(cls, policy):
    found = policy.original_layer_class()
    assert f"{found.__module__}.{found.__qualname__}" == cls
    assert issubclass(found, nn.Module)


def test_policies_of_subclasses_are_those_of_what_they_derive_from():
    model = MODELS["bert"].build()
    cls = type(model.bert.encoder.layer[0])
    model.bert.encoder.layer[0].__class__ = type("OwnLayer", (cls,), {})
    assert policies_for(model) == [BERT]
    assert len(make_plan(model, BERT, 2).places) == 2
    classes = [policy.original_layer_class().__name__ for policy in policies_for(MODELS["bart"].build())]
    assert classes == ["BartEncoderLayer", "BartDecoderLayer"]
    with pytest.raises(
        ValueError,
        match=r"no policy is shipped for Linear; write one .* or use one of .*albert, bart, bert, bert_generation,",
    ):
        policies_for(nn.Linear(2, 2))


def test_a_plan_says_how_each_parameter_is_cut():
    model = grouped()
    cuts = {name: cut for one in make_plan(model, [GroupedPolicy], 2).projections for name, cut in one.cuts.items()}
    assert cuts["blocks.0.qkv.weight"] == cuts["blocks.0.qkv.bias"] == Partition(0, (16, 8, 8))
    assert cuts["blocks.0.mlp.0.weight"] == Partition(0, (24, 24))
    assert cuts["blocks.1.out.weight"] == Partition(1)
    assert "blocks.1.mlp.2.bias" not in cuts  # added once, to the sum
    assert cuts.keys() == {
        f"blocks.{i}.{name}"
        for i in range(2)
        for name in ("qkv.weight", "qkv.bias", "out.weight", "mlp.0.weight", "mlp.0.bias", "mlp.2.weight")
    }
    gpt2 = make_plan(MODELS["gpt2_cross"].build(), policies_for(MODELS["gpt2_cross"].build()), 2).projections
    cuts = {name: cut for one in gpt2 for name, cut in one.cuts.items()}
    block = "transformer.h.0."
    assert cuts[block + "attn.c_attn.weight"] == Partition(1, (16, 16, 16))
    assert cuts[block + "crossattention.c_attn.bias"] == Partition(0, (16, 16))
    # Each reversed layer of a list is cut along its own dim, not along the one that the one before it left.
    assert cuts[block + "attn.c_proj.weight"] == cuts[block + "crossattention.c_proj.weight"] == Partition(0)
    assert cuts[block + "crossattention.q_attn.weight"] == Partition(1)


def test_modules_and_arguments_are_replaced():
    model = grouped()
    before = model(x=(x := torch.randn(2, 4, 16))).loss
    policy = change(GroupedPolicy, replace_arguments={"groups": 2, "mlp[1].beta": 3})
    model.blocks[0].mlp[1].beta = model.blocks[1].mlp[1].beta = 3
    apply_plan(model, make_plan(model, [policy], 1), ONE_PROCESS)
    assert all(isinstance(block.mlp[1], PlainGate) for block in model.blocks)
    assert type(model.blocks[0].out).__name__ == "AllReduceLinear"
    assert torch.allclose(model(x=x).loss, before, rtol=1e-6)  # the factors in another order
    copy.deepcopy(model)(x=x).loss.backward()


def test_everything_that_is_wrong_comes_in_one_error_with_the_valid_sizes():
    model = MODELS["gpt2"].build(n_embd=50, n_head=25)
    message = error_of(model, policies_for(model))
    assert message.startswith("GPT2LMHeadModel cannot be sharded over 2 processes by its policy:\n")
    assert "- transformer.h.0 and 1 more: 25 heads (num_attention_heads of the config), not divisible by 2" in message
    assert message.endswith("\nvalid tensor-parallel sizes: 1, 5, 25")

    wrong = change(
        GroupedPolicy,
        attn_qkv=[Layer("qkw.weight", "qkv.bias", n_fused=3)],
        attn_out=[Layer("out.weight", reversed=True)],
        embeddings=[Layer("words.weight")],
        shared_by_heads=["query_norms.weight"],
    )
    lines = error_of(grouped(), [wrong], 4).split("\n")
    expected = [
        "qkw.weight does not exist, did you mean qkv.weight?",
        "out is a Linear, which takes reversed=False, not True",
        "shared_by_heads: query_norms.weight does not exist, did you mean query_norm.weight?",
        "qkv.weight (32, 16) is as large as what is cut, and no rule names it",
        "embeddings: the model has no parameter that ends in words.weight",
        "groups is 2, not divisible by 4",
    ]
    for text in expected:
        assert sum(line.endswith(text) for line in lines) == 1, (text, lines)
    assert len(lines) == len(expected) + 2
    assert lines[-1] == "valid tensor-parallel sizes: 1, 2"


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (
            {"attn_qkv": [Layer("qkv.weight", "qkv.bias", parts=[16, 8])]},
            "qkv.weight is 32 along dim 0, its fused parts [16, 8] add up to 24",
        ),
        (
            {"attn_qkv": [Layer("norms[0].weight", "norms[0].bias")]},
            "norms.0.weight is (16,); a weight must have 2 dims",
        ),
        ({"divided": ["groups", "heads"]}, "heads of divided does not exist"),
        ({"mlp_out": []}, "its mlp has a projection that is cut, and none out of it that joins the parts"),
        (
            {"replace_arguments": {"head_dim": 2}},
            "replace_arguments gives 2 for head_dim on 1 process; the model has 4",
        ),
        ({"head": [Layer("query_norm.weight")]}, "query_norm.weight is not the weight of an nn.Linear"),
    ],
)
def test_rules_that_do_not_fit_are_named(methods, message):
    assert message in error_of(grouped(), [change(GroupedPolicy, **methods)])


def test_a_dead_path_is_an_error_where_heads_would_stay_as_they_are():
    model = MODELS_WITH_POLICIES["openai"].build()

    def arguments(config, size):
        return {"attn.split_size": 16 // size, "attn.heads": 4 // size, "attn.n_head": 4 // size}

    policy = type("Dead", (OpenAIGPTPolicy,), {"replace_arguments": staticmethod(arguments)})
    plan = make_plan(model, policy, 2)
    assert plan.notes == "- transformer.h.0 and 1 more: attn.heads of replace_arguments does not exist; it is left out"
    assert plan.places[0].arguments == {"attn.split_size": 8, "attn.n_head": 2}
    policy.replace_arguments = staticmethod(
        lambda config, size: {"attn.split_size": 16 // size, "attn.heads": 4 // size}
    )
    assert "attn.heads of replace_arguments does not exist, and attn.n_head stays as it is" in error_of(model, policy)


def test_what_an_old_policy_leaves_open_is_said():
    notes = {}
    for name in ("mpnet_old", "t5_old"):
        small = MODELS_WITH_POLICIES[name]
        model = small.build()
        notes[name] = make_plan(model, small.policy(model.config), 2).notes.split("\n")
    layers = "mpnet.encoder.layer.0 and 1 more: "
    whole = "is as large as what is cut, and no rule names it; it stays whole on every process"
    assert set(notes["mpnet_old"]) == {
        f"- {layers}attention.hidden_size of replace_arguments does not exist; it is left out",
        f"- {layers}intermediate.dense.weight (32, 16) {whole}",
        f"- {layers}output.dense.weight (16, 32) {whole}",
        "- MPNetLayerPolicy: replace_modules: the model has no module of class MPNetOldAttention",
    }
    assert notes["t5_old"] == [
        "- T5OldPolicy: replace_modules: OldFeedForward takes no hidden_states, as T5LayerFF does; it is left out"
    ]


def test_a_model_without_a_policy_falls_back_on_its_own_plan():
    model = MODELS_WITH_POLICIES["apertus_plan"].build()
    plan = make_plan(model, None, 2)
    assert [place.policy.__name__ for place in plan.places] == ["ApertusPlanPolicy"] * 2
    said = "no policy is shipped for it; it is cut by the tensor-parallel plan of its config"
    assert plan.notes == f"- ApertusForCausalLM: {said}"
    with pytest.warns(UserWarning, match=said):
        plan.warn()
    assert make_plan(model, policies_for(model), 2).notes == ""  # who names a policy knows it
    assert make_plan(MODELS["llama"].build(), None, 2).notes == ""


def with_adapter(layer):
    class Adapted(nn.Module):
        """As peft's: the matrix is the base layer's."""

        def __init__(self, base):
            super().__init__()
            self.base_layer, self.lora_A = base, nn.Linear(16, 2)

        @property
        def weight(self):
            return self.base_layer.weight

        bias = None

    layer.attention.self.query = Adapted(layer.attention.self.query)


CHANGED = [
    (with_adapter, "attention.self.query.weight is no parameter of its Adapted"),
    (
        lambda layer: prune.l1_unstructured(layer.output.dense, "weight", 0.5),
        "output.dense.weight is no parameter of its",
    ),
    (
        lambda layer: weight_norm(layer.intermediate.dense),
        "intermediate.dense.weight is no parameter of its Parametrized",
    ),
    (
        lambda layer: setattr(layer.output, "dense", torch.ao.nn.quantized.dynamic.Linear(32, 16)),
        "output.dense.weight is no parameter of its Linear",
    ),
]


@pytest.mark.parametrize(("change", "message"), CHANGED)
def test_adapted_pruned_weight_normed_and_quantized_models_are_refused(change, message):
    model = MODELS["bert"].build()
    change(model.bert.encoder.layer[1])
    problem = f"- bert.encoder.layer.1: {message}"
    advice = "adapters, pruning, weight norm and quantization must be taken off the model or merged first"
    for call in (lambda: make_plan(model, None, 2), lambda: swap(model)):
        with pytest.raises(ValueError, match="cannot be") as error:
            call()
        assert problem in str(error.value)
        assert advice in str(error.value)


def test_a_rule_for_a_buffer_is_refused():
    model = grouped()
    for block in model.blocks:
        block.register_buffer("slopes", torch.ones(4, 4))
    policy = change(GroupedPolicy, attn_qkv=[*GroupedPolicy.attn_qkv(), Layer("slopes")])
    assert "blocks.0 and 1 more: slopes is no parameter of its Block; a rule must not name a buffer" in error_of(
        model, policy
    )


def test_modules_of_unknown_classes_need_a_replacement():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = grouped()
    model.blocks[1].out.__class__ = Scaled
    policy = change(GroupedPolicy, attn_out=[Layer("out.weight")])
    assert "blocks.1: out is a Scaled, not an nn.Linear or a Conv1D; give its rule a replace" in error_of(
        model, [policy]
    )
    make_plan(model, [GroupedPolicy], 2)  # says which class


def test_tied_weights_are_cut_together():
    model = MODELS["gpt2"].build()
    policy = change(policies_for(model)[0], head=[])
    assert "lm_head.weight: it is tied to transformer.wte.weight, which is cut otherwise" in error_of(model, [policy])


def test_rules_may_allow_absence():
    model = MODELS_WITH_POLICIES["openai"].build()
    assert len(make_plan(model, [OpenAIGPTPolicy], 2).projections) == 8
    strict = change(OpenAIGPTPolicy, attn_qkv=[*OpenAIGPTPolicy.attn_qkv()[:1], Layer("crossattention.c_attn.weight")])
    assert "crossattention.c_attn.weight does not exist" in error_of(model, [strict])


def test_a_policy_whose_layers_the_model_lacks_is_unused():
    message = error_of(grouped(), [GroupedPolicy, BERT])
    assert "BertLayerPolicy: the model has no BertLayer, to whose layers the policy applies" in message
    absent = [Layer("other.weight", ignore_checker=True)]
    empty = dict.fromkeys(("attn_qkv", "attn_out", "mlp_in", "mlp_out"), absent)
    assert "blocks.0 and 1 more: no rule of Changed finds a tensor" in error_of(
        grouped(), [change(GroupedPolicy, **empty)]
    )


def test_plans_that_configs_carry_become_policies():
    config = MODELS["llama"].build().config
    policy = Policy.from_tp_plan(config)
    assert [layer.weight for layer in policy.attn_out()] == ["self_attn.o_proj.weight"]
    assert policy.original_layer_class().__name__ == "LlamaDecoderLayer"
    again = pickle.loads(pickle.dumps(policy))  # as `parallelize` sends it
    assert again.mlp_in() == policy.mlp_in()
    with pytest.raises(ValueError, match="BertConfig carries no base_model_tp_plan; write a policy"):
        Policy.from_tp_plan(MODELS["bert"].build().config)
    config.base_model_tp_plan = {"layers.*.mlp.experts": "grouped_gemm", "layers.*.self_attn.q_proj": "colwise"}
    with pytest.raises(
        ValueError, match="the plan of LlamaConfig has styles grouped_gemm; a policy can be made of colwise"
    ):
        Policy.from_tp_plan(config)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("t5", "T5BlockPolicy names no norms"), ("bert_decoder", "bert.encoder.layer.1 has cross-attention")],
)
def test_sequence_parallelism_says_where_it_works(name, reason):
    model = MODELS[name].build()
    plan = make_plan(model, policies_for(model), 2)
    with pytest.raises(
        ValueError,
        match=f"sequence_parallel=True: {reason}.*bert, camembert, .*ernie, .*llama, mistral, modernbert, opt, qwen3",
    ):
        check_sequence_parallel(plan)
    model = MODELS["opt"].build(layerdrop=0.1)
    with pytest.raises(ValueError, match="layerdrop may leave out the layers"):
        check_sequence_parallel(make_plan(model, policies_for(model), 2))


@pytest.mark.parametrize("name", MODELS)
def test_the_model_that_goes_to_another_process_is_the_same(name):
    model, inputs = MODELS[name].build(), MODELS[name].make_inputs()
    again = Portable.of(model).build().eval()
    assert torch.equal(again(**inputs).loss, model(**inputs).loss)
    assert {id(one) for one in again.parameters()} == {id(one) for one in model.parameters()}  # tied as before


def test_wrong_use_is_said_in_one_sentence():
    sharded = grouped()
    apply_plan(sharded, make_plan(sharded, [GroupedPolicy], 1), ONE_PROCESS)
    meta = grouped().to("meta")
    wrong = [
        (Layer, "a Layer names neither weight nor bias"),
        (lambda: Layer("a.weight", n_fused=0), "a.weight: n_fused is 0; it must be 1 or more"),
        (lambda: Layer("a.weight", n_fused=2, parts=[1, 1]), "a.weight: n_fused is 2"),
        (lambda: Layer("a.weight", layout="blocks"), "layout is 'blocks'; it must be one of concat, interleaved"),
        (lambda: shard(grouped(), None), "tp_group is None; give the process group"),
        (lambda: make_plan(sharded, [GroupedPolicy], 2), "this Grouped is sharded already"),
        (lambda: parallelize(grouped(), 0), "num_gpus is 0; it must be a number, 1 or more"),
        (lambda: parallelize(grouped(), True, 2), "num_gpus is True; it must be .*stands before fp16"),
        (lambda: parallelize(meta, 2), "the model is on meta; call model.cpu"),
        (lambda: parallelize(grouped(), 2), "no policy is shipped for Grouped"),
        (lambda: parallelize(grouped(), 2, policy=GroupedPolicy(None)), "policy is <.*>, not a class derived from"),
        (
            lambda: parallelize(grouped(), 2, policy=[nn.Linear]),
            "policy is <class .*Linear'>, not a class derived from",
        ),
        (
            lambda: swap(grouped(), change(Policy, attn_qkv=[Layer("q.weight")])),
            "Changed has no original_layer_class that returns the class of its layers",
        ),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
