"""Policies of decoders of text."""

from typing import Any

from .layer import Description, Layer
from .shipped_policy import ShippedPolicy, below, sizes


class GPT2Policy(ShippedPolicy):
    layer_class = "gpt2.modeling_gpt2.GPT2Block"
    optional = ("crossattention",)
    out = ("attn.c_proj", "crossattention.c_proj")
    wide = ("mlp.c_fc",)
    narrow = ("mlp.c_proj",)
    arguments = (
        *sizes("attn", num_heads="num_attention_heads", embed_dim="hidden_size", split_size="hidden_size"),
        *sizes("crossattention", num_heads="num_attention_heads", embed_dim="hidden_size", split_size="hidden_size"),
    )
    norm_paths = ("ln_1", "ln_2")
    embedding_paths = ("wte",)
    head_paths = ("lm_head",)

    @classmethod
    def attn_qkv(cls) -> list[Layer]:
        return [
            *cls.layers(("attn.c_attn",), n_fused=3),
            *cls.layers(("crossattention.c_attn",), n_fused=2),
            *cls.layers(("crossattention.q_attn",)),
        ]

    @classmethod
    def layers(cls, paths: tuple[str, ...], **fields: Any) -> list[Layer]:
        return super().layers(paths, reversed=True, **fields)  # Conv1D

    @staticmethod
    def describe(config: Any) -> Description:
        return Description(
            activation=config.activation_function,
            layer_norm_eps=config.layer_norm_epsilon,
            pre_layer_norm=True,
            causal=True,
            hidden_dropout=config.resid_pdrop,
            attention_dropout=config.attn_pdrop,
        )


class GPTNeoPolicy(ShippedPolicy):
    layer_class = "gpt_neo.modeling_gpt_neo.GPTNeoBlock"
    qkv = below("attn.attention", "q_proj", "k_proj", "v_proj")
    out = ("attn.attention.out_proj",)
    wide = ("mlp.c_fc",)
    narrow = ("mlp.c_proj",)
    arguments = sizes("attn.attention", num_heads="num_heads", embed_dim="hidden_size")
    norm_paths = ("ln_1", "ln_2")
    embedding_paths = ("wte",)
    head_paths = ("lm_head",)


class GPTJPolicy(ShippedPolicy):
    layer_class = "gptj.modeling_gptj.GPTJBlock"
    qkv = below("attn", "q_proj", "k_proj", "v_proj")
    out = ("attn.out_proj",)
    wide = ("mlp.fc_in",)
    narrow = ("mlp.fc_out",)
    arguments = sizes("attn", num_attention_heads="num_attention_heads", embed_dim="hidden_size")
    norm_paths = ("ln_1",)
    embedding_paths = ("wte",)
    head_paths = ("lm_head",)


class GPTNeoXPolicy(ShippedPolicy):
    layer_class = "gpt_neox.modeling_gpt_neox.GPTNeoXLayer"
    out = ("attention.dense",)
    wide = ("mlp.dense_h_to_4h",)
    narrow = ("mlp.dense_4h_to_h",)
    norm_paths = ("input_layernorm", "post_attention_layernorm")
    embedding_paths = ("embed_in",)
    head_paths = ("lm_head", "embed_out")  # the second in older versions

    @classmethod
    def attn_qkv(cls) -> list[Layer]:
        return cls.layers(("attention.query_key_value",), n_fused=3, layout="interleaved")


class OPTPolicy(ShippedPolicy):
    layer_class = "opt.modeling_opt.OPTDecoderLayer"
    qkv = below("self_attn", "q_proj", "k_proj", "v_proj")
    out = ("self_attn.out_proj",)
    wide = ("fc1",)
    narrow = ("fc2",)
    arguments = sizes("self_attn", num_heads="num_attention_heads", embed_dim="hidden_size")
    norm_paths = ("self_attn_layer_norm", "final_layer_norm")
    embedding_paths = ("embed_tokens",)
    head_paths = ("lm_head",)


class LlamaPolicy(ShippedPolicy):
    layer_class = "llama.modeling_llama.LlamaDecoderLayer"
    qkv = below("self_attn", "q_proj", "k_proj", "v_proj")
    out = ("self_attn.o_proj",)
    wide = below("mlp", "gate_proj", "up_proj")
    narrow = ("mlp.down_proj",)
    embedding_paths = ("embed_tokens",)
    head_paths = ("lm_head",)

    @classmethod
    def norms(cls) -> list[Layer]:
        return [Layer("input_layernorm.weight"), Layer("post_attention_layernorm.weight")]
