"""BERT and GPT against `transformers` with the same weights, and their losses."""

import pytest
import torch
import torch.nn.functional as F
from helpers.lora import adapt, adapters

from xformer_train.kernels.ops.choices import IGNORED
from xformer_train.kernels.parallel.collectives import TensorParallel
from xformer_train.recipes import RECIPES
from xformer_train.recipes.config import LayerFlags, ModelConfig, ObjectiveConfig
from xformer_train.recipes.recipe import Runtime

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.2,
}
VOCABULARY = 101


def randomize(model):
    """Biases and LayerNorms start at 0 and 1, where a swapped pair of them would go unseen."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def copy_layer(target, source, prefix_to_name):
    for ours, theirs in prefix_to_name.items():
        target[ours] = source[theirs]


def bert_pair(hidden_act):
    theirs = randomize(
        transformers.BertForPreTraining(
            transformers.BertConfig(
                vocab_size=VOCABULARY, hidden_act={"gelu": "gelu", "gelu_tanh": "gelu_new"}[hidden_act], **SIZES
            )
        )
    )
    model = ModelConfig(type="bert", pre_layer_norm=False, hidden_act=hidden_act, **SIZES)
    ours = RECIPES["bert"].build_model(model, LayerFlags(), ObjectiveConfig(), VOCABULARY).eval()
    state = theirs.state_dict()
    names = {
        "bert.embeddings.word_embeddings": "word_embeddings",
        "bert.embeddings.position_embeddings": "position_embeddings",
        "bert.embeddings.token_type_embeddings": "token_type_embeddings",
        "bert.embeddings.LayerNorm": "embedding_norm",
        "bert.pooler.dense": "pooler",
        "cls.predictions.transform.dense": "mlm_transform",
        "cls.predictions.transform.LayerNorm": "mlm_norm",
        "cls.seq_relationship": "sentence_classifier",
    }
    per_layer = {
        "attention.output.dense": "attention_output",
        "attention.output.LayerNorm": "attention_norm",
        "intermediate.dense": "intermediate",
        "output.dense": "output",
        "output.LayerNorm": "mlp_norm",
    }
    for i in range(SIZES["num_hidden_layers"]):
        names |= {f"bert.encoder.layer.{i}.{a}": f"layers.{i}.{b}" for a, b in per_layer.items()}
    new = {"mlm_bias": state["cls.predictions.bias"]}
    for source, target in names.items():
        for kind in ("weight", "bias"):
            if f"{source}.{kind}" in state:
                new[f"{target}.{kind}"] = state[f"{source}.{kind}"]
    for i in range(SIZES["num_hidden_layers"]):
        for kind in ("weight", "bias"):
            parts = [state[f"bert.encoder.layer.{i}.attention.self.{p}.{kind}"] for p in ("query", "key", "value")]
            new[f"layers.{i}.qkv.{kind}"] = torch.cat(parts)
    ours.load_state_dict(new)
    return ours, theirs


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("padded", [False, True])
def test_bert_logits_equal_those_of_transformers(hidden_act, padded):
    ours, theirs = bert_pair(hidden_act)
    ids, types = torch.randint(0, VOCABULARY, (3, 17)), torch.randint(0, 2, (3, 17))
    mask = torch.ones(3, 17, dtype=torch.bool)
    if padded:
        mask[1, 9:] = False
        mask[2, 1:] = False
    expected = theirs(ids, attention_mask=mask.long(), token_type_ids=types)
    hidden = ours.encode(ids, types, mask)
    assert (ours.mlm_logits(hidden) - expected.prediction_logits)[mask].abs().max() < 1e-5
    torch.testing.assert_close(ours.sentence_logits(hidden[:, 0]), expected.seq_relationship_logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_gpt_logits_equal_those_of_transformers(padded):
    theirs = randomize(
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_inner=48, n_positions=40, initializer_range=0.2
            )
        )
    )
    model = ModelConfig(type="gpt", hidden_act="gelu_tanh", layer_norm_eps=1e-5, **SIZES)
    ours = RECIPES["gpt"].build_model(model, LayerFlags(), ObjectiveConfig(type="clm"), VOCABULARY).eval()
    state = theirs.state_dict()
    names = {
        "transformer.wte": "word_embeddings",
        "transformer.wpe": "position_embeddings",
        "transformer.ln_f": "final_norm",
    }
    per_layer = {
        "ln_1": "attention_norm",
        "attn.c_attn": "qkv",
        "attn.c_proj": "attention_output",
        "ln_2": "mlp_norm",
        "mlp.c_fc": "intermediate",
        "mlp.c_proj": "output",
    }
    for i in range(3):
        names |= {f"transformer.h.{i}.{a}": f"layers.{i}.{b}" for a, b in per_layer.items()}
    new = {}
    for source, target in names.items():
        for kind in ("weight", "bias"):
            if f"{source}.{kind}" in state:
                value = state[f"{source}.{kind}"]
                # GPT-2 stores its projections transposed
                new[f"{target}.{kind}"] = value.t() if ".c_" in source and kind == "weight" else value
    ours.load_state_dict(new)
    ids = torch.randint(0, VOCABULARY, (3, 17))
    mask = torch.ones(3, 17, dtype=torch.bool)
    if padded:
        mask[1, 9:] = False
    expected = theirs(ids, attention_mask=mask.long()).logits
    logits = ours.logits(ours.encode(ids, attention_mask=mask))
    torch.testing.assert_close(logits[mask], expected[mask], rtol=0, atol=1e-5)


def test_bert_loss_is_the_sum_over_masked_positions_and_sentences():
    ours, _ = bert_pair("gelu")
    ids, types = torch.randint(0, VOCABULARY, (3, 17)), torch.zeros(3, 17, dtype=torch.int64)
    mask = torch.ones(3, 17, dtype=torch.bool)
    positions = torch.tensor([1, 5, 20, 50])
    labels = torch.tensor([7, IGNORED, 9, 3])
    sentences = torch.tensor([0, 1, 1])
    sums = ours(ids, types, mask, positions, labels, sentences)
    hidden = ours.encode(ids, types, mask)
    scores = ours.mlm_logits(hidden).flatten(0, 1)[positions]
    torch.testing.assert_close(sums["mlm"], F.cross_entropy(scores, labels, reduction="sum", ignore_index=IGNORED))
    torch.testing.assert_close(
        sums["nsp"], F.cross_entropy(ours.sentence_logits(hidden[:, 0]), sentences, reduction="sum")
    )
    counts = RECIPES["bert"].loss_counts({"masked_labels": labels, "sentence_labels": sentences}, ObjectiveConfig())
    assert counts == {"mlm": 3, "nsp": 3}


def test_every_bert_parameter_gets_a_gradient():
    model = ModelConfig(type="bert", **{**SIZES, "hidden_dropout_prob": 0.1})
    bert = RECIPES["bert"].build_model(model, LayerFlags(), ObjectiveConfig(), VOCABULARY)
    ids = torch.randint(0, VOCABULARY, (2, 40))
    types = (torch.arange(40) > 20).long().expand(2, 40)
    sums = bert(ids, types, ids > -1, torch.tensor([1, 60]), torch.tensor([5, 6]), torch.tensor([0, 1]))
    (sums["mlm"] + sums["nsp"]).backward()
    assert [name for name, p in bert.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("pre_layer_norm", [True, False])
@pytest.mark.parametrize("task,hole,dropout", [("nsp", False, 0.2), ("sop", True, 0.0), ("none", False, 0.2)])
def test_leaving_padding_out_changes_neither_losses_nor_gradients(task, hole, dropout, pre_layer_norm):
    """Attention draws the same dropout in both layouts; a hole in a row does not shift the positions behind it."""
    sizes = SIZES | {"attention_probs_dropout_prob": dropout, "pre_layer_norm": pre_layer_norm}
    model, objective = ModelConfig(type="bert", **sizes), ObjectiveConfig(sentence_task=task)
    bert = randomize(RECIPES["bert"].build_model(model, LayerFlags(), objective, VOCABULARY)).double().train()
    real = torch.arange(17) < torch.tensor([[17], [1], [9]])
    real[2, 4:6] = not hole
    batch = {
        "input_ids": torch.randint(0, VOCABULARY, (3, 17)),
        "token_type_ids": torch.randint(0, 2, (3, 17)),
        "attention_mask": real,
        "masked_positions": torch.tensor([0, 16, 34, 41, 42]),
        "masked_labels": torch.randint(0, VOCABULARY, (5,)),
        "sentence_labels": torch.tensor([0, 1, 1]),
    }
    rows_seen = []
    bert.layers[1].register_forward_hook(
        lambda _, arguments, output: rows_seen.append((arguments[0].shape, output.shape))
    )
    results = []
    for extra in ({}, {"token_positions": real.flatten().nonzero().flatten()}):
        torch.manual_seed(2)
        sums = bert(**batch, **extra)
        results.append((sums, torch.autograd.grad(sum(sums.values()), list(bert.parameters()))))
    tokens = int(real.sum())
    assert rows_seen == [((3, 17, 32), (3, 17, 32)), ((tokens, 32), (tokens, 32))]
    # the sentence loss is computed in fp32, all else in fp64
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=1e-6)


def test_bert_samples_in_one_row_equal_samples_in_rows_of_their_own_in_losses_and_gradients():
    """Dropout is off, as it counts elements. Padding, a segment of its own, changes nothing either."""
    model, objective = ModelConfig(type="bert", **SIZES), ObjectiveConfig(sentence_task="none")
    bert = randomize(RECIPES["bert"].build_model(model, LayerFlags(), objective, VOCABULARY)).double().train()
    lengths, size = (6, 1, 9), 19
    ids = torch.zeros(1, size, dtype=torch.int64)
    ids[0, :16] = torch.randint(1, VOCABULARY, (16,))
    segments = torch.tensor([[0] * 6 + [1] + [2] * 9 + [3] * 3])
    position_ids = torch.tensor([[*range(6), 0, *range(9), *range(3)]])
    positions = torch.tensor([2, 5, 6, 8, 15])
    labels = torch.randint(0, VOCABULARY, (5,))
    packed = bert(
        ids,
        torch.zeros_like(ids),
        segments < 3,
        positions,
        labels,
        position_ids=position_ids,
        segment_ids=segments,
    )["mlm"]
    alone, first = 0, 0
    hidden = bert.encode(ids, position_ids=position_ids, segment_ids=segments)
    for length in lengths:
        own = ids[:, first : first + length]
        here = (positions >= first) & (positions < first + length)
        everything = torch.ones_like(own, dtype=torch.bool)
        alone = alone + bert(own, torch.zeros_like(own), everything, positions[here] - first, labels[here])["mlm"]
        torch.testing.assert_close(hidden[:, first : first + length], bert.encode(own))
        first += length
    torch.testing.assert_close(packed, alone)
    gradients = [torch.autograd.grad(loss, list(bert.parameters())) for loss in (packed, alone)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("task", ["none", "sop"])
def test_the_sentence_task_decides_which_heads_exist(task):
    model = ModelConfig(type="bert", **SIZES)
    bert = RECIPES["bert"].build_model(model, LayerFlags(), ObjectiveConfig(sentence_task=task), VOCABULARY)
    names = {name.split(".")[0] for name, _ in bert.named_parameters()}
    assert ("pooler" in names) is (task == "sop")


def test_gpt_documents_in_one_row_equal_documents_in_rows_of_their_own():
    model = ModelConfig(type="gpt", **SIZES)
    gpt = RECIPES["gpt"].build_model(model, LayerFlags(), ObjectiveConfig(type="clm"), VOCABULARY).eval()
    first, second = torch.randint(0, VOCABULARY, (1, 6)), torch.randint(0, VOCABULARY, (1, 9))
    packed = gpt.encode(
        torch.cat([first, second], 1),
        position_ids=torch.cat([torch.arange(6), torch.arange(9)])[None],
        segment_ids=torch.tensor([[0] * 6 + [1] * 9]),
    )
    torch.testing.assert_close(packed[:, :6], gpt.encode(first))
    torch.testing.assert_close(packed[:, 6:], gpt.encode(second))


def test_a_sequence_longer_than_the_positions_is_refused():
    model = ModelConfig(type="gpt", **SIZES)
    gpt = RECIPES["gpt"].build_model(model, LayerFlags(), ObjectiveConfig(type="clm"), VOCABULARY)
    with pytest.raises(ValueError, match="41 positions, max_position_embeddings=40"):
        gpt.encode(torch.zeros(1, 41, dtype=torch.int64))


class TwoProcesses:
    """A process group as far as a model looks at it while it is built."""

    def size(self):
        return 2

    def rank(self):
        return 1


@pytest.mark.parametrize(("kind", "task"), [("bert", "mlm"), ("gpt", "clm")])
def test_a_vocabulary_that_processes_cannot_share_is_refused(kind, task):
    runtime, model = Runtime(parallel=TensorParallel(TwoProcesses())), ModelConfig(type=kind, **SIZES)
    with pytest.raises(ValueError, match="vocab_size=101 is not divisible by the 2 processes"):
        RECIPES[kind].build_model(model, LayerFlags(), ObjectiveConfig(type=task), VOCABULARY, runtime)


def test_a_head_with_a_hook_is_refused_where_processes_share_its_rows():
    model, _ = runs_model("llama")
    model.lm_head.register_forward_hook(lambda *_: None)
    model.parallel = TensorParallel(TwoProcesses())
    with pytest.raises(
        ValueError, match="lm_head, a Linear, has hooks or a forward of its own, which know nothing of the 2"
    ):
        model.logits(torch.zeros(1, 32))


@pytest.mark.parametrize(("kind", "task"), [("bert", "mlm"), ("gpt", "clm")])
def test_the_layers_of_a_model_take_fp8_from_the_runtime(kind, task):
    model = ModelConfig(type=kind, **SIZES)
    ids = torch.randint(0, VOCABULARY, (2, 16))
    hidden = []
    for fp8 in (False, True):
        torch.manual_seed(0)
        built = RECIPES[kind].build_model(model, LayerFlags(), ObjectiveConfig(type=task), VOCABULARY, Runtime(fp8=fp8))
        hidden.append(built.eval().encode(ids))
    assert 0 < (hidden[0] - hidden[1]).norm() < 0.2 * hidden[0].norm()


def test_flops_follow_the_published_count_for_bert_large():
    model = ModelConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    # 236.8 GFLOP per sequence of 128 is what DeepSpeed's 272 sequences/s = 64.4 TFLOP/s rests on
    assert RECIPES["bert"].flops_per_sample(model, 30528, 128, 0) == pytest.approx(236.8e9, rel=1e-3)


TODAYS = {"position_embedding": "rope", "gated_mlp": True, "norm_bias": False, "mlp_bias": False}
KINDS = {
    "bert": {"type": "bert"},
    "gpt": {"type": "gpt"},
    "modernbert": {"type": "bert", "sliding_window": 4, "global_attn_every_n_layers": 2, **TODAYS},
    "llama": {
        "type": "gpt",
        "norm": "rms_norm",
        "num_key_value_heads": 2,
        "qk_norm": True,
        "tie_word_embeddings": False,
        **TODAYS,
    },
}


def runs_model(name, **options):
    """A model of a run, and a batch for it."""
    torch.manual_seed(2)
    kind, model = KINDS[name]["type"], ModelConfig(pre_layer_norm=True, **SIZES, **KINDS[name])
    built = RECIPES[kind].build_model(model, LayerFlags(**options), ObjectiveConfig(), VOCABULARY)
    ids = torch.randint(5, VOCABULARY, (2, 9))
    if kind == "gpt":
        return built, {"input_ids": ids, "labels": ids.roll(-1)}
    places, mask = torch.tensor([1, 4, 12]), torch.ones(2, 9, dtype=torch.bool)
    batch = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "attention_mask": mask}
    batch |= {"masked_positions": places, "masked_labels": ids.flatten()[places]}
    return built, batch | {"sentence_labels": torch.tensor([0, 1])}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_on_a_runs_model_are_trained(kind):
    model, batch = runs_model(kind)
    names = ("qkv", "attention_output", "intermediate", "output", "mlm_transform", "pooler", "lm_head")
    plain = sum(model(**batch).values())
    adapt(model, names)
    sum(model(**batch).values()).backward()
    assert len(adapters(model)) == 2 * (3 * 4 + {"bert": 2, "modernbert": 2, "llama": 1, "gpt": 0}[kind])
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapters(model))
    with torch.no_grad():
        for parameter in adapters(model)[1::2]:
            parameter.zero_()
    torch.testing.assert_close(sum(model(**batch).values()), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_on_any_module_of_a_runs_model_runs_once_a_pass(kind):
    model, batch = runs_model(kind)
    plain, called = model(**batch), []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    hooked = model(**batch)
    for name, loss in plain.items():
        torch.testing.assert_close(hooked[name], loss)
    assert sorted(called) == sorted(name for name, _ in model.named_modules())
