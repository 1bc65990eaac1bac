"""Policies of encoders of images and of speech."""

from .shipped_policy import ShippedPolicy, below, sizes


class ViTPolicy(ShippedPolicy):
    layer_class = "vit.modeling_vit.ViTLayer"
    qkv = below("attention", "q_proj", "k_proj", "v_proj")
    out = ("attention.o_proj",)
    wide = ("mlp.fc1",)
    narrow = ("mlp.fc2",)
    arguments = sizes("attention", num_attention_heads="num_attention_heads")


class DeiTPolicy(ViTPolicy):
    layer_class = "deit.modeling_deit.DeiTLayer"


class CLIPPolicy(ShippedPolicy):
    """Of both towers."""

    layer_class = "clip.modeling_clip.CLIPEncoderLayer"
    qkv = below("self_attn", "q_proj", "k_proj", "v_proj")
    out = ("self_attn.out_proj",)
    wide = ("mlp.fc1",)
    narrow = ("mlp.fc2",)
    arguments = sizes("self_attn", num_heads="num_attention_heads", embed_dim="hidden_size")


class Wav2Vec2Policy(ShippedPolicy):
    layer_class = "wav2vec2.modeling_wav2vec2.Wav2Vec2EncoderLayer"
    qkv = below("attention", "q_proj", "k_proj", "v_proj")
    out = ("attention.out_proj",)
    wide = ("feed_forward.intermediate_dense",)
    narrow = ("feed_forward.output_dense",)
    arguments = sizes("attention", num_heads="num_attention_heads", embed_dim="hidden_size")
    whole = ("adapter_layer",)


class Wav2Vec2StablePolicy(Wav2Vec2Policy):
    layer_class = "wav2vec2.modeling_wav2vec2.Wav2Vec2EncoderLayerStableLayerNorm"


class HubertPolicy(Wav2Vec2Policy):
    layer_class = "hubert.modeling_hubert.HubertEncoderLayer"


class HubertStablePolicy(Wav2Vec2Policy):
    layer_class = "hubert.modeling_hubert.HubertEncoderLayerStableLayerNorm"
