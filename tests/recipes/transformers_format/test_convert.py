"""Our models and those of transformers: each computes what the other does after the weights went over, or is refused."""

import json

import pytest
import torch
from helpers.hf_configs import ROTARY_BERT, ROTARY_GPT

from xformer_train.recipes import RECIPES
from xformer_train.recipes.config import LayerFlags, ModelConfig, ObjectiveConfig, TokenizerConfig
from xformer_train.recipes.data.tokenizer import train_tokenizer
from xformer_train.recipes.transformers_format.convert import (
    config_json,
    from_huggingface,
    model_config_of,
    sentence_task_of,
    to_huggingface,
)

transformers = pytest.importorskip("transformers")

ROWS = 288  # more than the 257 or 261 symbols of a bytes tokenizer
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SHARED = {
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "head_dim": 8,
    "intermediate_size": 37,
    "max_position_embeddings": 24,
}
MODERN = {**SIZES, "hidden_size": 30, "num_attention_heads": 5, "num_hidden_layers": 4, "max_position_embeddings": 24}
ROTARY = {"rope_type": "default", "rope_theta": 77.0}
THEIRS = {
    "bert": {**SIZES, "max_position_embeddings": 24},
    "bert tanh": {**SIZES, "max_position_embeddings": 24, "hidden_act": "gelu_new"},
    "bert accurate": {**SIZES, "max_position_embeddings": 24, "hidden_act": "gelu_accurate"},
    "roberta": {**SIZES, "max_position_embeddings": 26, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    "xlm-roberta": {**SIZES, "max_position_embeddings": 26, "type_vocab_size": 1},
    "camembert": {**SIZES, "max_position_embeddings": 26, "type_vocab_size": 2},
    "roberta-prelayernorm": {**SIZES, "max_position_embeddings": 26},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 24},
    "gpt2 erf": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24, "activation_function": "gelu"},
    "llama": {**SHARED, "hidden_size": 42, "num_key_value_heads": 2, "rope_parameters": ROTARY},
    "llama with biases": {**SHARED, "hidden_size": 18, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    "llama tied": {**SHARED, "hidden_size": 42, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "mistral": {**SHARED, "hidden_size": 31, "num_key_value_heads": 3, "sliding_window": 5},
    "mistral without a window": {**SHARED, "hidden_size": 31, "num_key_value_heads": 6, "sliding_window": None},
    "qwen3": {**SHARED, "hidden_size": 31, "num_key_value_heads": 2, "attention_bias": True},
    "qwen3 with windows": {
        **SHARED,
        "hidden_size": 31,
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "modernbert": {**MODERN, "local_attention": 6},
    "modernbert with biases": {
        **MODERN,
        "local_attention": 7,
        "global_attn_every_n_layers": 2,
        "norm_bias": True,
        "attention_bias": True,
        "mlp_bias": True,
        "classifier_bias": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "classifier_activation": "gelu_pytorch_tanh",
        "rope_parameters": {
            "full_attention": ROTARY,
            "sliding_attention": {"rope_type": "default", "rope_theta": 31.0},
        },
    },
}
DECODERS = ("gpt2", "llama", "mistral", "qwen3")
OURS = {
    "post-LN": {"pre_layer_norm": False},
    "post-LN tanh": {"pre_layer_norm": False, "hidden_act": "gelu_tanh", "layer_norm_eps": 1e-5},
    "pre-LN": {"pre_layer_norm": True},
    "gpt": {"type": "gpt", "hidden_act": "gelu_tanh", "layer_norm_eps": 1e-5},
    "gpt erf": {"type": "gpt"},
    "llama": {**ROTARY_GPT, **SHARED, "hidden_size": 42, "num_key_value_heads": 2, "rope_theta": 77.0},
    "llama untied": {
        **ROTARY_GPT,
        **SHARED,
        "hidden_size": 18,
        "num_key_value_heads": 6,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "mlp_bias": True,
        "hidden_act": "gelu_tanh",
    },
    "mistral": {**ROTARY_GPT, **SHARED, "hidden_size": 31, "num_key_value_heads": 3, "sliding_window": 5},
    "qwen3": {
        **ROTARY_GPT,
        **SHARED,
        "hidden_size": 31,
        "num_key_value_heads": 2,
        "qk_norm": True,
        "attention_bias": True,
    },
    "qwen3 with windows": {
        **ROTARY_GPT,
        **SHARED,
        "hidden_size": 31,
        "num_key_value_heads": 2,
        "qk_norm": True,
        "sliding_window": 4,
        "global_attn_every_n_layers": 2,
        "tie_word_embeddings": False,
    },
    "modernbert": {
        **ROTARY_BERT,
        **MODERN,
        "sliding_window": 6,
        "global_attn_every_n_layers": 3,
        "rope_theta": 77.0,
        "local_rope_theta": 31.0,
    },
    "modernbert with biases": {
        **ROTARY_BERT,
        **MODERN,
        "norm_bias": True,
        "attention_bias": True,
        "mlp_bias": True,
        "hidden_act": "silu",
        "sliding_window": 7,
        "global_attn_every_n_layers": 2,
    },
    "modernbert of global layers": {**ROTARY_BERT, **MODERN},
    "modernbert of local layers": {**ROTARY_BERT, **MODERN, "sliding_window": 6},
}
# What a config.json says though null says it too.
WRITTEN_OUT = {f"modernbert {kind}": {"local_rope_theta": 10000.0} for kind in ("with biases", "of local layers")}
WITHOUT_SENTENCES = [kind for kind in OURS if OURS[kind].get("type") == "gpt" or "modernbert" in kind]
TOLERANCE = {"rtol": 0, "atol": 1e-5}  # fp32 logits of magnitude 1 to 10, in another order of sums


def perturbed(model):
    """In evaluation mode, biases, LayerNorms and padding rows too so far from their start that a mistake shows."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def bytes_tokenizer(model_type):
    return train_tokenizer("bytes", TokenizerConfig(), (), print, specials=RECIPES[model_type].tokenizer.specials)


def stock(kind):
    model_type = kind.split()[0]
    given = {"vocab_size": 90, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
    given |= {"pad_token_id": None if model_type == "gpt2" else 1} | THEIRS[kind]
    config = transformers.AutoConfig.for_model(model_type, **given)
    auto = transformers.AutoModelForCausalLM if model_type in DECODERS else transformers.AutoModelForPreTraining
    if model_type == "modernbert":
        auto = transformers.AutoModelForMaskedLM
    torch.manual_seed(0)
    return perturbed(auto.from_config(config))


def ours(config, task="none"):
    torch.manual_seed(0)
    build = RECIPES[config.type].build_model
    return build(config, LayerFlags(), ObjectiveConfig(sentence_task=task), config.vocab_size)


def inputs(vocabulary, pad, side="right"):
    """Ids and mask of three rows, of which two are padded at this side."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocabulary, (3, 13), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 7:] = mask[2, 2:] = False
    mask = mask if side == "right" else mask.flip(1)
    return ids.where(mask, pad), mask


def our_logits(model, ids, mask, types=None):
    if model.config.type == "gpt":
        return model.logits(model.encode(ids, attention_mask=mask))
    return model.mlm_logits(model.encode(ids, types, mask))


def logits(output):
    return output.prediction_logits if hasattr(output, "prediction_logits") else output.logits


def sides(kind):
    """Where padding may stand: anywhere with rotary positions, which count from one token to another."""
    return ("left", "right") if kind.startswith(("llama", "mistral", "qwen3", "modernbert")) else ("right",)


@pytest.mark.parametrize(("kind", "side"), [(kind, side) for kind in THEIRS for side in sides(kind)])
@torch.inference_mode()
def test_a_model_of_ours_with_their_weights_has_their_logits(kind, side):
    theirs = stock(kind)
    config = theirs.config.to_dict()
    weights, left_out = from_huggingface(theirs.state_dict(), config)
    assert left_out == []
    model = ours(model_config_of(config), sentence_task_of(config)).eval()
    assert weights.keys() == model.state_dict().keys()
    model.load_state_dict(weights)
    ids, mask = inputs(90, 1, side)
    types = torch.zeros_like(ids) if kind != "camembert" else (torch.arange(13) > 4).long().expand(3, -1)
    extra = {} if kind.startswith((*DECODERS, "modernbert")) else {"token_type_ids": types}
    expected = logits(theirs(ids, attention_mask=mask.long(), **extra))
    torch.testing.assert_close(our_logits(model, ids, mask, types)[mask], expected[mask], **TOLERANCE)


def our_config(kind):
    return ModelConfig(**{**SIZES, "max_position_embeddings": 24, "vocab_size": ROWS} | OURS[kind])


def skip_without_one_kind_of_layers():
    from huggingface_hub.errors import StrictDataclassFieldValidationError

    try:
        transformers.ModernBertConfig(global_attn_every_n_layers=1)
    except StrictDataclassFieldValidationError:
        pytest.skip("this transformers makes no ModernBERT of one kind of layers")


EXPORTS = [
    *((kind, "none", side) for kind in OURS for side in sides(kind)),
    *((kind, "nsp", "right") for kind in OURS if kind not in WITHOUT_SENTENCES),
]


@pytest.mark.parametrize(("kind", "task", "side"), EXPORTS)
@torch.inference_mode()
def test_transformers_loads_an_export_and_has_our_logits(kind, task, side, tmp_path):
    config = our_config(kind)
    if kind.endswith(" layers"):
        skip_without_one_kind_of_layers()
    model = perturbed(ours(config, task))
    tokenizer = bytes_tokenizer(config.type)
    written = write_folder(tmp_path, model, config, tokenizer, task)
    auto = transformers.AutoModelForCausalLM if config.type == "gpt" else transformers.AutoModelForMaskedLM
    theirs, told = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"]
    if kind in WITHOUT_SENTENCES:  # others keep their sentence head beside
        assert not told["unexpected_keys"] and not told["mismatched_keys"]
    ids, mask = inputs(tokenizer.vocab_size, written.get("pad_token_id", 0), side)
    types = (torch.arange(13) > 4).long().expand(3, -1)
    extra = {} if kind in WITHOUT_SENTENCES else {"token_type_ids": types}
    symbols = tokenizer.vocab_size
    found = logits(theirs(ids, attention_mask=mask.long(), **extra))
    assert found.shape[-1] == symbols < ROWS
    torch.testing.assert_close(found[mask], our_logits(model, ids, mask, types)[mask][:, :symbols], **TOLERANCE)
    if task == "none":
        return
    for labels in (1, 2, 3):  # a new classifier, whatever the sentence head was for
        auto = transformers.AutoModelForSequenceClassification
        theirs, told = auto.from_pretrained(tmp_path, num_labels=labels, output_loading_info=True)
        assert "classifier" in "".join(told["missing_keys"]) and theirs(ids).logits.shape == (3, labels)
        tuned, _ = from_huggingface(theirs.state_dict(), theirs.config.to_dict())
        assert not any(name.startswith("sentence_classifier") for name in tuned)
    if not kind.startswith("post"):
        return
    theirs, told = transformers.AutoModelForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"]
    found = theirs(ids, attention_mask=mask.long(), **extra).seq_relationship_logits
    torch.testing.assert_close(found, model.sentence_logits(model.encode(ids, types, mask)[:, 0]), **TOLERANCE)


def write_folder(folder, model, config, tokenizer, task):
    from safetensors.torch import save_file

    written = config_json(config, tokenizer, task)
    (folder / "config.json").write_text(json.dumps(written))
    save_file(to_huggingface(model.state_dict(), config, written), folder / "model.safetensors", {"format": "pt"})
    return written


@pytest.mark.parametrize("kind", OURS)
def test_export_and_import_give_the_same_bits(kind):
    config = our_config(kind)
    task = "none" if kind in WITHOUT_SENTENCES else "sop"
    state = perturbed(ours(config, task)).state_dict()
    tokenizer = bytes_tokenizer(config.type)
    written = config_json(config, tokenizer, task)
    back, left_out = from_huggingface(to_huggingface(state, config, written), written)
    assert (model_config_of(written), sentence_task_of(written), left_out) == (
        config.model_copy(update={"vocab_size": tokenizer.vocab_size} | WRITTEN_OUT.get(kind, {})),
        task,
        [],
    )
    assert back.keys() == state.keys()
    for name, tensor in back.items():
        rows = len(tensor)
        assert torch.equal(tensor, state[name][:rows]) and (rows == len(state[name]) or rows == tokenizer.vocab_size)


def test_bodies_alone_and_names_of_2018_are_read():
    theirs = stock("bert")
    config, state = theirs.config.to_dict(), theirs.state_dict()
    expected, _ = from_huggingface(state, config)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in state.items()
    }
    found, _ = from_huggingface(old, config)
    assert found.keys() == expected.keys()
    body, left_out = from_huggingface(theirs.bert.state_dict() | {"qa_outputs.weight": torch.ones(2, 32)}, config)
    assert body.keys() == {name for name in expected if not name.startswith(("mlm_", "sentence_"))}
    assert all(torch.equal(body[name], expected[name]) for name in body)
    assert [name.endswith("qa_outputs.weight") for name in left_out] == [True]


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "modernbert"])
def test_bodies_of_todays_models_are_read_and_heads_stay_new(kind):
    theirs = stock(kind)
    config = theirs.config.to_dict()
    expected, _ = from_huggingface(theirs.state_dict(), config)
    body, left_out = from_huggingface(theirs.model.state_dict(), config)
    assert left_out == [] and expected.keys() - body.keys() == {
        name for name in expected if name.startswith(("lm_head", "mlm_"))
    }
    assert all(torch.equal(body[name], expected[name]) for name in body)


def test_parts_of_other_sizes_than_the_config_says_are_named():
    theirs = stock("llama")
    config, state = theirs.config.to_dict(), theirs.state_dict()
    key, gate = "model.layers.1.self_attn.k_proj.weight", "model.layers.2.mlp.gate_proj.weight"
    for name, rows in ((key, "48, 16, 16"), (gate, "37, 37")):
        for cut in (state[name][:-1], state[name][:, :-1]):
            with pytest.raises(ValueError, match=f"{name} .* must have {rows} rows of one size by config.json"):
                from_huggingface(state | {name: cut}, config)


def test_a_classifier_of_another_task_is_no_sentence_head():
    theirs = stock("roberta-prelayernorm")
    other = {"classifier.dense.weight": torch.ones(32, 32), "classifier.out_proj.weight": torch.ones(3, 32)}
    for config in (theirs.config.to_dict(), theirs.config.to_dict() | {"sentence_task": "nsp"}):  # which has two labels
        weights, left_out = from_huggingface(theirs.state_dict() | other, config)
        assert not any(name.startswith(("pooler", "sentence_classifier")) for name in weights)
        assert left_out == list(other)


def test_what_no_model_here_computes_is_refused_with_all_reasons():
    config = stock("bert").config.to_dict() | {
        "hidden_act": "relu",
        "position_embedding_type": "relative_key",
        "tie_word_embeddings": False,
        "type_vocab_size": 5,
    }
    with pytest.raises(ValueError) as error:
        model_config_of(config)
    for reason in ("'relu'", "relative_key", "tie_word_embeddings is False", "type_vocab_size is 5"):
        assert reason in str(error.value)
    with pytest.raises(
        ValueError, match=r"model_type 't5', and only bert, roberta, .* gpt2, llama, mistral, qwen3 compute"
    ):
        model_config_of({"model_type": "t5"})
    with pytest.raises(ValueError, match="hidden_size is 'wide'"):
        model_config_of({"model_type": "bert", "hidden_size": "wide", "vocab_size": 90})
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx is True"):
        model_config_of(stock("gpt2").config.to_dict() | {"scale_attn_by_inverse_layer_idx": True})


def test_missing_weights_are_named():
    theirs = stock("gpt2")
    state = {name: tensor for name, tensor in theirs.state_dict().items() if "h.1.ln_2" not in name}
    with pytest.raises(ValueError, match=r"lack transformer.h.1.ln_2.weight, transformer.h.1.ln_2.bias, which a gpt2"):
        from_huggingface(state, theirs.config.to_dict())


def test_a_pre_ln_bert_with_tanh_gelu_is_computed_by_no_architecture():
    tokenizer = bytes_tokenizer("bert")
    with pytest.raises(ValueError, match=r"hidden_act=gelu_tanh.*pre_layer_norm=false or hidden_act=gelu"):
        config_json(ModelConfig(hidden_act="gelu_tanh"), tokenizer, "nsp")
