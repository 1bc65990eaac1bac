"""config.json of public models and of ours: the model that each describes, in old and new words, and what is refused."""

import pytest
from helpers.hf_configs import (
    LLAMA_3_2_1B,
    MISTRAL_7B,
    MODERNBERT_BASE,
    PUBLIC,
    QWEN3_0_6B,
    ROTARY_BERT,
    ROTARY_GPT,
    SMOLLM_135M,
)

from xformer_train.recipes import RECIPES
from xformer_train.recipes.config import ModelConfig, TokenizerConfig
from xformer_train.recipes.data.tokenizer import train_tokenizer
from xformer_train.recipes.transformers_format.convert import config_json, differing_keys, model_config_of


def test_public_models_are_ours_in_every_key():
    assert model_config_of(SMOLLM_135M) == ModelConfig(
        **ROTARY_GPT,
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        max_position_embeddings=2048,
        layer_norm_eps=1e-5,
        vocab_size=49152,
    )
    assert model_config_of(MISTRAL_7B) == ModelConfig(
        **ROTARY_GPT,
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        max_position_embeddings=32768,
        sliding_window=4096,
        layer_norm_eps=1e-5,
        tie_word_embeddings=False,
        vocab_size=32000,
    )
    assert model_config_of(QWEN3_0_6B) == ModelConfig(
        **ROTARY_GPT,
        hidden_size=1024,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        qk_norm=True,
        intermediate_size=3072,
        max_position_embeddings=40960,
        rope_theta=1e6,
        layer_norm_eps=1e-6,
        vocab_size=151936,
    )
    assert model_config_of(MODERNBERT_BASE) == ModelConfig(
        **ROTARY_BERT,
        hidden_size=768,
        num_hidden_layers=22,
        num_attention_heads=12,
        intermediate_size=1152,
        max_position_embeddings=8192,
        rope_theta=160_000.0,
        local_rope_theta=10_000.0,
        sliding_window=128,
        global_attn_every_n_layers=3,
        vocab_size=50368,
    )


@pytest.mark.parametrize("name", PUBLIC)
def test_the_config_json_that_todays_transformers_writes_describes_the_same_model(name):
    transformers = pytest.importorskip("transformers")
    old = PUBLIC[name]
    new = transformers.AutoConfig.for_model(**old).to_dict()
    assert "rope_theta" not in new and new["rope_parameters"]
    assert not differing_keys(model_config_of(new), model_config_of(old))


def refusal(config, **changes):
    with pytest.raises(ValueError) as error:
        model_config_of(config | changes)
    return str(error.value)


def test_scaled_rotary_positions_are_refused_by_their_type():
    assert "describes what no model here computes: rope_scaling has rope_type 'llama3', not 'default'" in refusal(
        LLAMA_3_2_1B
    )
    new = {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0}
    assert "rope_parameters has rope_type 'yarn'" in refusal(SMOLLM_135M, rope_parameters=new)
    assert "rope_scaling has rope_type 'linear'" in refusal(QWEN3_0_6B, rope_scaling={"type": "linear", "factor": 2.0})
    local = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "dynamic", "factor": 2.0}}
    assert "rope_parameters has rope_type 'dynamic'" in refusal(MODERNBERT_BASE, rope_parameters=local)


def test_all_that_we_lack_comes_in_one_message():
    text = refusal(
        MODERNBERT_BASE,
        decoder_bias=False,
        tie_word_embeddings=False,
        classifier_activation="relu",
        classifier_bias=True,
        hidden_activation="tanh",
        rope_scaling={"type": "linear", "factor": 2.0},
        layer_types=["full_attention"] * 3 + ["sliding_attention"] * 19,
    )
    for reason in (
        "decoder_bias is False, not True",
        "tie_word_embeddings is False, not True",
        "classifier_activation is 'relu', but hidden_activation 'tanh'",
        "classifier_bias is True, but mlp_bias False",
        "hidden_activation is 'tanh', not one of gelu, ",
        "rope_scaling has rope_type 'linear'",
        "layers 0, 1, 2 are global, not every n-th from the first on",
    ):
        assert text.count(reason) == 1, (text, reason)


@pytest.mark.parametrize(
    ("config", "changes", "reason"),
    [
        (SMOLLM_135M, {"pretraining_tp": 2}, "pretraining_tp is 2, not 1"),
        (SMOLLM_135M, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, not 1.0"),
        (SMOLLM_135M, {"rope_parameters": [3]}, "rope_parameters is [3], not an object"),
        (SMOLLM_135M, {"rope_theta": "far"}, "rope_theta is 'far'"),
        (SMOLLM_135M, {"num_key_value_heads": "few"}, "num_key_value_heads is 'few'"),
        (
            QWEN3_0_6B,
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 9},
            "max_window_layers is 9 of 28",
        ),
        (
            QWEN3_0_6B,
            {"layer_types": ["chunked_attention"] * 28},
            "layer_types must name sliding_attention or full_attention",
        ),
        (MODERNBERT_BASE, {"layer_types": ["full_attention"]}, "for each of 22 layers"),
        (MODERNBERT_BASE, {"layer_types": 7}, "for each of 22 layers"),
        (MODERNBERT_BASE, {"num_hidden_layers": 10**12, "hidden_size": "x"}, "hidden_size is 'x'"),
        (
            SMOLLM_135M,
            {"model_type": "qwen2"},
            "'qwen2', which has biases of queries, keys and values without one behind",
        ),
        (SMOLLM_135M, {"model_type": "mixtral"}, "'mixtral', which has experts, and only bert"),
        (SMOLLM_135M, {"model_type": "gemma"}, "'gemma', which has norms that multiply by 1 + weight"),
    ],
)
def test_what_we_lack_is_refused_by_name(config, changes, reason):
    assert reason in refusal(config, **changes)


@pytest.mark.parametrize(
    ("changes", "window", "every"),
    [
        ({}, None, None),
        ({"sliding_window": 64}, None, None),  # use_sliding_window is false
        ({"use_sliding_window": True, "sliding_window": 64}, None, None),  # 28 of 28 layers see all
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}, 64, None),
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, 64, 28),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 64,
                "layer_types": ["full_attention", *["sliding_attention"] * 3] * 7,
            },
            64,
            4,
        ),
    ],
)
def test_windows_of_qwen3_are_read_from_either_spelling(changes, window, every):
    model = model_config_of(QWEN3_0_6B | changes)
    assert (model.sliding_window, model.global_attn_every_n_layers) == (window, every)


def test_a_window_over_all_positions_is_none():
    assert model_config_of(MISTRAL_7B | {"sliding_window": 32768}).sliding_window is None
    assert model_config_of(MISTRAL_7B | {"sliding_window": None}).sliding_window is None
    assert model_config_of(MODERNBERT_BASE | {"global_attn_every_n_layers": 1}).sliding_window is None


def written(task="none", **fields):
    model = ModelConfig(**fields)
    specials = RECIPES[model.type].tokenizer.specials
    tokenizer = train_tokenizer("bytes", TokenizerConfig(), (), print, specials=specials)
    return config_json(model, tokenizer, task)


SMALL = {"hidden_size": 24, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 40}
WINDOWS = {"sliding_window": 8, "global_attn_every_n_layers": 3}


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        (ROTARY_GPT, "LlamaForCausalLM"),
        (ROTARY_GPT | {"hidden_act": "gelu", "attention_bias": True, "mlp_bias": True}, "LlamaForCausalLM"),
        (ROTARY_GPT | {"sliding_window": 8}, "MistralForCausalLM"),
        (
            ROTARY_GPT | {"num_attention_heads": 5, "head_dim": 4},
            "MistralForCausalLM",
        ),  # LlamaConfig asks for whole heads
        (ROTARY_GPT | {"qk_norm": True}, "Qwen3ForCausalLM"),
        (ROTARY_GPT | WINDOWS | {"qk_norm": True, "attention_bias": True}, "Qwen3ForCausalLM"),
        (ROTARY_BERT | WINDOWS, "ModernBertForMaskedLM"),
        (ROTARY_BERT | {"norm_bias": True, "mlp_bias": True, "attention_bias": True}, "ModernBertForMaskedLM"),
        ({"type": "gpt", "hidden_act": "silu"}, "GPT2LMHeadModel"),
    ],
)
def test_an_export_picks_the_class(fields, name):
    assert written(**SMALL | fields)["architectures"] == [name]


@pytest.mark.parametrize(
    ("fields", "reasons"),
    [
        (
            ROTARY_GPT | {"norm": "layer_norm", "gated_mlp": False},
            ("closest is llama", "norm is layer_norm, and there it is"),
        ),
        (ROTARY_GPT | WINDOWS, ("closest is mistral", "global_attn_every_n_layers is 3, and there it is null")),
        (ROTARY_GPT | {"sliding_window": 8, "mlp_bias": True}, ("mlp_bias is true, and there it is false",)),
        (ROTARY_GPT | WINDOWS | {"qk_norm": True, "local_rope_theta": 5e3}, ("local_rope_theta is 5000.0",)),
        ({"type": "gpt", "norm_bias": False}, ("closest is gpt2", "norm_bias is false, and there it is true")),
        ({"type": "gpt", "tie_word_embeddings": False}, ("tie_word_embeddings is false",)),
        ({"type": "gpt", "num_key_value_heads": 2}, ("num_key_value_heads is 2, and there it is null",)),
        ({"gated_mlp": True, "pre_layer_norm": False}, ("closest is bert", "gated_mlp is true")),
        (ROTARY_BERT | {"qk_norm": True, "norm": "rms_norm"}, ("closest is modernbert", "qk_norm", "norm is rms_norm")),
        (ROTARY_BERT | {"task": "sop"}, ("sentence_task is sop, and there are no token types and no head for it",)),
    ],
)
def test_what_no_class_computes_is_refused_with_all_reasons(fields, reasons):
    with pytest.raises(
        ValueError, match=r"no architecture of transformers computes this (gpt|bert); the closest"
    ) as error:
        written(**SMALL | fields)
    assert all(reason in str(error.value) for reason in reasons), str(error.value)


def test_values_of_equal_effect_do_not_differ():
    def gpt(**fields):
        return ModelConfig(**SMALL, **ROTARY_GPT | fields)

    assert not differing_keys(gpt(), gpt(num_key_value_heads=6, head_dim=4))
    assert not differing_keys(gpt(), gpt(hidden_dropout_prob=0.3, initializer_range=0.3, vocab_size=7))
    local = {"sliding_window": 8}
    assert not differing_keys(gpt(**local), gpt(**local, local_rope_theta=1e4))
    assert not differing_keys(gpt(**local, rope_theta=3.0, local_rope_theta=5.0), gpt(**local, rope_theta=5.0))
    assert not differing_keys(*(gpt(**local, global_attn_every_n_layers=every) for every in (6, 9)))
    assert differing_keys(gpt(), gpt(num_key_value_heads=3, head_dim=6)) == ["num_key_value_heads", "head_dim"]
    assert differing_keys(gpt(), gpt(sliding_window=8)) == ["sliding_window"]
    mixed = local | {"global_attn_every_n_layers": 3}
    assert differing_keys(gpt(**local), gpt(**mixed)) == ["global_attn_every_n_layers"]
    assert differing_keys(gpt(**mixed), gpt(**mixed, local_rope_theta=5.0)) == ["local_rope_theta"]
