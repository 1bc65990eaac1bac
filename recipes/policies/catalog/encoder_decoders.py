"""Policies of encoder-decoders of text."""

from typing import Any, ClassVar

from .layer import Layer
from .shipped_policy import ShippedPolicy, below, sizes


class T5Policy(ShippedPolicy):
    """Of both stacks: layer[1] of a block is the MLP in the encoder, cross-attention in the decoder."""

    layer_class = "t5.modeling_t5.T5Block"
    optional = ("layer[1]", "layer[2]", "shared")
    out = ("layer[0].SelfAttention.o", "layer[1].EncDecAttention.o")
    wide = tuple(f"layer[{i}].DenseReluDense.{name}" for i in (1, 2) for name in ("wi", "wi_0", "wi_1"))
    narrow = ("layer[1].DenseReluDense.wo", "layer[2].DenseReluDense.wo")
    embedding_paths = ("shared", "embed_tokens")
    head_paths = ("lm_head",)

    @classmethod
    def replace_arguments(cls, config: Any, world_size: int) -> dict[str, Any]:
        heads = config.num_heads // world_size
        return {
            f"{attention}.{name}": size
            for attention in ("layer[0].SelfAttention", "layer[1].EncDecAttention")
            for name, size in {"n_heads": heads, "inner_dim": heads * config.d_kv}.items()
        }

    @classmethod
    def attn_qkv(cls) -> list[Layer]:
        bias = (
            "layer[0].SelfAttention.relative_attention_bias.weight"  # (buckets, heads), in the first block of a stack
        )
        return [
            *cls.layers(below("layer[0].SelfAttention", "q", "k", "v")),
            *cls.layers(below("layer[1].EncDecAttention", "q", "k", "v")),
            Layer(bias, reversed=True, ignore_checker=True),
        ]


class BartEncoderPolicy(ShippedPolicy):
    layer_class = "bart.modeling_bart.BartEncoderLayer"
    optional = ("shared",)
    qkv = below("self_attn", "k_proj", "v_proj", "q_proj")
    out: ClassVar[tuple[str, ...]] = ("self_attn.out_proj",)
    wide = ("fc1",)
    narrow = ("fc2",)
    arguments = sizes("self_attn", num_heads="encoder_attention_heads", embed_dim="d_model")
    embedding_paths = ("shared", "embed_tokens")
    head_paths = ("lm_head",)


class BartDecoderPolicy(BartEncoderPolicy):
    layer_class = "bart.modeling_bart.BartDecoderLayer"
    qkv = (*BartEncoderPolicy.qkv, *below("encoder_attn", "k_proj", "v_proj", "q_proj"))
    out = ("self_attn.out_proj", "encoder_attn.out_proj")
    arguments = (
        *sizes("self_attn", num_heads="decoder_attention_heads", embed_dim="d_model"),
        *sizes("encoder_attn", num_heads="decoder_attention_heads", embed_dim="d_model"),
    )


class MBartEncoderPolicy(BartEncoderPolicy):
    layer_class = "mbart.modeling_mbart.MBartEncoderLayer"


class MBartDecoderPolicy(BartDecoderPolicy):
    layer_class = "mbart.modeling_mbart.MBartDecoderLayer"


class PegasusEncoderPolicy(BartEncoderPolicy):
    layer_class = "pegasus.modeling_pegasus.PegasusEncoderLayer"


class PegasusDecoderPolicy(BartDecoderPolicy):
    layer_class = "pegasus.modeling_pegasus.PegasusDecoderLayer"


class MarianEncoderPolicy(BartEncoderPolicy):
    layer_class = "marian.modeling_marian.MarianEncoderLayer"


class MarianDecoderPolicy(BartDecoderPolicy):
    layer_class = "marian.modeling_marian.MarianDecoderLayer"
