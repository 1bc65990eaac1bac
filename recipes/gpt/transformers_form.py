"""GPT in transformers: GPT-2, or with rotary positions Llama and its relatives."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..config import ModelConfig, SpecialToken
from ..shared.positions_form import layer_types, rope_parameters, rope_theta, window_keys
from ..shared.transformers_form import Architecture, TransformersForm

_NOTE = """\
In training, documents were packed into rows, each token saw its own document alone, and positions began at 0 in each document.
The exported model reads its input as one document.

The tokenizer pads on the left with the end-of-document token, as `generate` needs it for a batch.
"""
_LEARNED_NOTE = """\
For fine-tuning set `tokenizer.padding_side = "right"`, so that positions begin at 0.
"""
_INPUTS = ("input_ids", "attention_mask")  # GPT-2 would add embeddings for token types
_SYMBOLS: dict[str, SpecialToken] = {"bos_token_id": "eos", "eos_token_id": "eos", "pad_token_id": "eos"}
_GPT2 = Architecture(
    model_type="gpt2",
    fixed={"type": "gpt", "pre_layer_norm": True},
    base="transformer",
    layers="h",
    body={"word_embeddings": "wte", "position_embeddings": "wpe", "final_norm": "ln_f"},
    layer={
        "attention_norm": ("ln_1",),
        "qkv": ("attn.c_attn",),
        "attention_output": ("attn.c_proj",),
        "mlp_norm": ("ln_2",),
        "intermediate": ("mlp.c_fc",),
        "output": ("mlp.c_proj",),
    },
    heads={},
    keys={
        "hidden_size": ("n_embd", 768),
        "num_hidden_layers": ("n_layer", 12),
        "num_attention_heads": ("n_head", 12),
        "intermediate_size": ("n_inner", None),
        "hidden_act": ("activation_function", "gelu_new"),
        "max_position_embeddings": ("n_positions", 1024),
        "layer_norm_eps": ("layer_norm_epsilon", 1e-5),
        "hidden_dropout_prob": ("resid_pdrop", 0.1),
        "attention_probs_dropout_prob": ("attn_pdrop", 0.1),
        "initializer_range": ("initializer_range", 0.02),
    },
    features={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    symbols=_SYMBOLS,
    copies={"embd_pdrop": "hidden_dropout_prob"},
    ignored=("lm_head.weight", ".attn.bias", ".attn.masked_bias"),  # of layers: the causal mask, in old checkpoints
    classes=("GPT2LMHeadModel",),
    inputs=_INPUTS,
    transposed=True,
)


def _read_rotary(config: Mapping[str, Any], obstacles: list[str]) -> dict[str, Any]:
    return {"rope_theta": rope_theta(config, obstacles)}


def _write_rotary(model: ModelConfig) -> dict[str, Any]:
    theta = model.rope_theta
    if model.local_rope_theta is not None and all(map(model.is_local, range(model.num_hidden_layers))):
        theta = model.local_rope_theta
    return {
        "num_key_value_heads": model.key_heads,
        "head_dim": model.head_size,
        "rope_parameters": rope_parameters(theta),
        "rope_theta": theta,  # for transformers 4, as all that is written twice
    }


_KEYS = {
    "hidden_size": ("hidden_size", 4096),
    "num_hidden_layers": ("num_hidden_layers", 32),
    "num_attention_heads": ("num_attention_heads", 32),
    "num_key_value_heads": ("num_key_value_heads", None),
    "head_dim": ("head_dim", None),
    "intermediate_size": ("intermediate_size", 11008),
    "hidden_act": ("hidden_act", "silu"),
    "max_position_embeddings": ("max_position_embeddings", 2048),
    "layer_norm_eps": ("rms_norm_eps", 1e-6),
    "attention_probs_dropout_prob": ("attention_dropout", 0.0),
    "initializer_range": ("initializer_range", 0.02),
    "tie_word_embeddings": ("tie_word_embeddings", False),
}
_ROTARY = {
    "type": "gpt",
    "pre_layer_norm": True,
    "position_embedding": "rope",
    "norm": "rms_norm",
    "norm_bias": False,
    "gated_mlp": True,
    "hidden_dropout_prob": 0.0,
}
_LLAMA = Architecture(
    model_type="llama",
    fixed=_ROTARY,
    base="model",
    layers="layers",
    body={"word_embeddings": "embed_tokens", "final_norm": "norm"},
    layer={
        "attention_norm": ("input_layernorm",),
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention_output": ("self_attn.o_proj",),
        "mlp_norm": ("post_attention_layernorm",),
        "intermediate": ("mlp.gate_proj", "mlp.up_proj"),
        "output": ("mlp.down_proj",),
    },
    heads={"lm_head": "lm_head"},
    keys=_KEYS | {"attention_bias": ("attention_bias", False), "mlp_bias": ("mlp_bias", False)},
    features={"pretraining_tp": 1},
    symbols=_SYMBOLS,
    ignored=("lm_head.weight", "rotary_emb.inv_freq"),  # the latter in old checkpoints
    classes=("LlamaForCausalLM",),
    inputs=_INPUTS,
    read=_read_rotary,
    write=_write_rotary,
)


def _read_mistral(config: Mapping[str, Any], obstacles: list[str]) -> dict[str, Any]:
    window, positions = config.get("sliding_window", 4096), config.get("max_position_embeddings")
    if isinstance(window, int) and isinstance(positions, int) and window >= positions:
        window = None  # it hides nothing
    return _read_rotary(config, obstacles) | {"sliding_window": window}


_MISTRAL = replace(
    _LLAMA,
    model_type="mistral",
    fixed=_ROTARY | {"attention_bias": False, "mlp_bias": False},
    keys=_KEYS
    | {
        "num_key_value_heads": ("num_key_value_heads", 8),
        "intermediate_size": ("intermediate_size", 14336),
        "max_position_embeddings": ("max_position_embeddings", 131072),
    },
    features={},
    classes=("MistralForCausalLM",),
    read=_read_mistral,
    write=lambda model: _write_rotary(model) | {"sliding_window": model.sliding_window},
)


def _read_qwen3(config: Mapping[str, Any], obstacles: list[str]) -> dict[str, Any]:
    found = _read_rotary(config, obstacles)
    depth, whole = config.get("num_hidden_layers", 32), config.get("max_window_layers", 28)
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window", False) else None
    if config.get("layer_types") is not None:
        return found | window_keys(config["layer_types"], depth, window, obstacles)
    if window is None or not isinstance(depth, int) or not isinstance(whole, int) or whole >= depth:
        return found
    if whole > 1:
        obstacles.append(
            f"max_window_layers is {whole} of {depth} layers, and the first n of several cannot be global here"
        )
    return found | {"sliding_window": window, "global_attn_every_n_layers": depth if whole > 0 else None}


def _write_qwen3(model: ModelConfig) -> dict[str, Any]:
    windows = {
        "use_sliding_window": model.sliding_window is not None,
        "sliding_window": model.sliding_window,
        "layer_types": layer_types(model),
        "max_window_layers": layer_types(model).count("full_attention"),
    }
    return _write_rotary(model) | windows


_QWEN3 = replace(
    _LLAMA,
    model_type="qwen3",
    fixed=_ROTARY | {"mlp_bias": False, "qk_norm": True},
    layer={**_LLAMA.layer, "q_norm": ("self_attn.q_norm",), "k_norm": ("self_attn.k_norm",)},
    keys=_KEYS
    | {
        "num_key_value_heads": ("num_key_value_heads", 32),
        "head_dim": ("head_dim", 128),
        "intermediate_size": ("intermediate_size", 22016),
        "max_position_embeddings": ("max_position_embeddings", 32768),
        "attention_bias": ("attention_bias", False),
    },
    features={},
    classes=("Qwen3ForCausalLM",),
    read=_read_qwen3,
    write=_write_qwen3,
)


def _written_as(model: ModelConfig) -> Architecture:
    if model.position_embedding == "learned":
        return _GPT2
    if model.qk_norm:
        return _QWEN3
    whole_heads = model.hidden_size % model.num_attention_heads == 0  # which LlamaConfig asks for, whatever head_dim is
    return _LLAMA if model.sliding_window is None and whole_heads else _MISTRAL


GPT_IN_TRANSFORMERS = TransformersForm(
    architectures=(_GPT2, _LLAMA, _MISTRAL, _QWEN3),
    written_as=_written_as,
    generation=_SYMBOLS,
    padding_side="left",  # so that all texts of a batch go on at its end
    post_processor=lambda _: None,
    pipeline_tag="text-generation",
    auto_class="AutoModelForCausalLM",
    objective=lambda _: "next token",
    notes=lambda model, _: [_NOTE, _LEARNED_NOTE] if model.position_embedding == "learned" else [_NOTE],
    lacked={
        "qwen2": "biases of queries, keys and values without one behind attention",
        "mixtral": "experts",
        "qwen3_moe": "experts",
        "gemma": "norms that multiply by 1 + weight",
        "gemma2": "norms that multiply by 1 + weight",
        "gemma3_text": "norms that multiply by 1 + weight",
    },
)
