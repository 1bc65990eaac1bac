"""The shipped policies: where transformers' models keep their projections.

A family names all models whose layers have the same modules. Attention stays whole where it draws or reshapes what belongs to
all heads together.
"""

import dataclasses
from typing import Any

from .layer import Description, Layer
from .shipped_policy import ShippedPolicy


class BertLikePolicy(ShippedPolicy):
    """Of layers with BERT's modules that compute otherwise, or give back a tuple."""

    models = (
        "megatron_bert.MegatronBertLayer rembert.RemBertLayer roformer.RoFormerLayer luke.LukeLayer "
        "xlm_roberta_xl.XLMRobertaXLLayer bert_generation.BertGenerationLayer visual_bert.VisualBertLayer "
        "layoutlm.LayoutLMLayer tapas.TapasLayer data2vec.modeling_data2vec_text.Data2VecTextLayer"
    )
    attention = (
        "attention.self.{query,key,value} attention.self.{w2e,e2w,e2e}_query? crossattention.self.{query,key,value}? -> "
        "attention.output.dense crossattention.output.dense?"
    )
    mlp = "intermediate.dense -> output.dense"
    counts = "{attention,crossattention}.self.{num_attention_heads,all_head_size}"


class BertPolicy(BertLikePolicy):
    models = (
        "bert.BertLayer electra.ElectraLayer ernie.ErnieLayer roberta.RobertaLayer xlm_roberta.XLMRobertaLayer "
        "camembert.CamembertLayer"
    )
    norm_paths = "attention.output.LayerNorm output.LayerNorm"

    @staticmethod
    def describe(config: Any) -> Description:
        return Description(
            activation=config.hidden_act,
            layer_norm_eps=config.layer_norm_eps,
            pre_layer_norm=False,
            causal=config.is_decoder,
            hidden_dropout=config.hidden_dropout_prob,
            attention_dropout=config.attention_probs_dropout_prob,
        )


class RobertaPreLayerNormPolicy(BertPolicy):
    """Of what `xformer-train export` makes of a pre-LN BERT."""

    models = "roberta_prelayernorm.RobertaPreLayerNormLayer"
    norm_paths = "attention.LayerNorm intermediate.LayerNorm"

    @staticmethod
    def describe(config: Any) -> Description:
        return dataclasses.replace(BertPolicy.describe(config), pre_layer_norm=True)


class IBertPolicy(BertLikePolicy):
    models = "ibert.IBertLayer"
    words = logits = ""  # of a class that is no nn.Embedding


class BertMlpPolicy(ShippedPolicy):
    models = "big_bird.BigBirdLayer convbert.ConvBertLayer longformer.LongformerLayer"
    mlp = BertPolicy.mlp
    whole = "attention crossattention"


class LxmertPolicy(BertLikePolicy):
    models = "lxmert.LxmertLayer"
    counts = "attention.self.{num_attention_heads,head_size}"


class LxmertCrossPolicy(ShippedPolicy):
    models = "lxmert.LxmertXLayer"
    attention = (
        "{visual_attention.att,lang_self_att.self,visn_self_att.self}.{query,key,value} -> "
        "{visual_attention,lang_self_att,visn_self_att}.output.dense"
    )
    mlp = "{lang,visn}_inter.dense -> {lang,visn}_output.dense"
    counts = "{visual_attention.att,lang_self_att.self,visn_self_att.self}.{num_attention_heads,head_size}"


class DistilBertPolicy(ShippedPolicy):
    models = "distilbert.TransformerBlock"
    attention = "attention.{q,k,v}_lin -> attention.out_lin"
    mlp = "ffn.lin1 -> ffn.lin2"
    counts = "attention.{n_heads,dim}"
    norm_paths = "sa_layer_norm output_layer_norm"

    @staticmethod
    def describe(config: Any) -> Description:
        return Description(
            activation=config.activation,
            layer_norm_eps=1e-12,  # written in the layer, not in the config
            pre_layer_norm=False,
            causal=False,
            hidden_dropout=config.dropout,
            attention_dropout=config.attention_dropout,
            drops_attention_output=False,
        )


class AlbertPolicy(ShippedPolicy):
    models = "albert.AlbertLayer"
    attention = "attention.{query,key,value} -> attention.dense"
    mlp = "ffn -> ffn_output"
    counts = "attention.{num_attention_heads,all_head_size}"


class MPNetPolicy(BertLikePolicy):
    models = "mpnet.MPNetLayer"
    attention = "attention.attn.{q,k,v} -> attention.attn.o"
    counts = "attention.attn.{num_attention_heads,all_head_size}"


class MPNetEncoderPolicy(ShippedPolicy):
    """Of the biases by distance that the layers are given."""

    models = "mpnet.MPNetEncoder"
    attention = "relative_attention_bias? ->"
    counts = "n_heads"


class DebertaV2Policy(BertLikePolicy):
    models = "deberta_v2.DebertaV2Layer"
    # Positions may use the projections of queries and keys.
    attention = "attention.self.{query,key,value}_proj attention.self.pos_{key,query}_proj? -> attention.output.dense"
    counts = "attention.self.{num_attention_heads,all_head_size}"
    whole = "attention.self.pos_dropout"  # of the embeddings of distances, which all heads share


class DebertaPolicy(DebertaV2Policy):
    models = "deberta.DebertaLayer"
    # The first is fused head by head.
    attention = "attention.self.in_proj attention.self.{pos_proj,pos_q_proj}? -> attention.output.dense"

    @classmethod
    def attn_qkv(cls) -> list[Layer]:
        return [*super().attn_qkv(), *(Layer(bias=f"attention.self.{name}_bias") for name in "qv")]


class MobileBertPolicy(BertLikePolicy):
    models = "mobilebert.MobileBertLayer"
    mlp = "intermediate.dense ffn[{0,1,2}].intermediate.dense? -> output.dense ffn[{0,1,2}].output.dense?"
    whole = "bottleneck output.bottleneck"  # they feed normalizations, which need whole rows
    words = logits = ""  # logits are made of two tensors


class XLNetPolicy(ShippedPolicy):
    models = "xlnet.XLNetLayer"
    mlp = "ff.layer_1 -> ff.layer_2"
    whole = "rel_attn"


class FunnelPolicy(ShippedPolicy):
    models = "funnel.FunnelLayer"
    mlp = "ffn.linear_1 -> ffn.linear_2"
    whole = "attention"


class XLMAttentionPolicy(ShippedPolicy):
    models = "xlm.MultiHeadAttention flaubert.MultiHeadAttention"
    attention = "{q,k,v}_lin -> out_lin"
    counts = "dim n_heads"


class XLMMlpPolicy(ShippedPolicy):
    models = "xlm.TransformerFFN flaubert.TransformerFFN"
    mlp = "lin1 -> lin2"


class ReformerPolicy(ShippedPolicy):
    models = "reformer.ReformerLayer"
    attention = (
        "attention.self_attention.{query_key,query,key}? attention.self_attention.value -> attention.output.dense"
    )
    mlp = "feed_forward.dense.dense -> feed_forward.output.dense"
    counts = "attention.self_attention.{num_attention_heads,all_head_size}"


class OpenAIGPTPolicy(ShippedPolicy):
    models = "openai.Block"
    attention = "attn.c_attn*3 -> attn.c_proj"
    mlp = "mlp.c_fc -> mlp.c_proj"
    counts = "attn.{n_head,split_size}"


class GPT2Policy(OpenAIGPTPolicy):
    models = "gpt2.GPT2Block"
    attention = "attn.c_attn*3 crossattention.c_attn*2? crossattention.q_attn? -> attn.c_proj crossattention.c_proj?"
    counts = "{attn,crossattention}.{num_heads,embed_dim,split_size}"
    norm_paths = "ln_1 ln_2"

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
    models = "gpt_neo.GPTNeoBlock"
    attention = "attn.attention.{q,k,v}_proj -> attn.attention.out_proj"
    mlp = "mlp.c_fc -> mlp.c_proj"
    counts = "attn.attention.{num_heads,embed_dim}"
    norm_paths = "ln_1 ln_2"


class GPTJPolicy(ShippedPolicy):
    models = "gptj.GPTJBlock"
    attention = "attn.{q,k,v}_proj -> attn.out_proj"
    mlp = "mlp.fc_in -> mlp.fc_out"
    counts = "attn.{num_attention_heads,embed_dim}"
    norm_paths = "ln_1"


class GPTNeoXPolicy(ShippedPolicy):
    models = "gpt_neox.GPTNeoXLayer"
    attention = "attention.query_key_value -> attention.dense"  # fused head by head
    mlp = "mlp.dense_h_to_4h -> mlp.dense_4h_to_h"
    norm_paths = "input_layernorm post_attention_layernorm"


class CTRLPolicy(ShippedPolicy):
    models = "ctrl.EncoderLayer"
    attention = "multi_head_attention.W{q,k,v} -> multi_head_attention.dense"
    mlp = "ffn[0] -> ffn[2]"
    counts = "multi_head_attention.{num_heads,d_model_size}"


class LlamaPolicy(ShippedPolicy):
    models = "llama.LlamaDecoderLayer"
    attention = "self_attn.{q,k,v}_proj -> self_attn.o_proj"
    mlp = "mlp.{gate,up}_proj -> mlp.down_proj"
    norm_paths = "input_layernorm post_attention_layernorm"


class T5Policy(ShippedPolicy):
    models = "t5.T5Block mt5.MT5Block"
    attention = (
        "layer[0].SelfAttention.{q,k,v} layer[0].SelfAttention.relative_attention_bias? layer[1].EncDecAttention.{q,k,v}? -> "
        "layer[0].SelfAttention.o layer[1].EncDecAttention.o?"
    )
    mlp = "layer[-1].DenseReluDense.{wi,wi_0,wi_1}? -> layer[-1].DenseReluDense.wo"
    counts = "{layer[0].SelfAttention,layer[1].EncDecAttention}.{n_heads,inner_dim}"


class BartPolicy(ShippedPolicy):
    """Of encoders and decoders, with cross-attention or without."""

    models = (
        "bart.BartEncoderLayer bart.BartDecoderLayer mbart.MBartEncoderLayer mbart.MBartDecoderLayer "
        "pegasus.PegasusEncoderLayer pegasus.PegasusDecoderLayer marian.MarianEncoderLayer marian.MarianDecoderLayer "
        "blenderbot.BlenderbotEncoderLayer blenderbot.BlenderbotDecoderLayer xglm.XGLMDecoderLayer "
        "blenderbot_small.BlenderbotSmallEncoderLayer blenderbot_small.BlenderbotSmallDecoderLayer "
        "m2m_100.M2M100EncoderLayer m2m_100.M2M100DecoderLayer bigbird_pegasus.BigBirdPegasusDecoderLayer "
        "speech_to_text.Speech2TextEncoderLayer speech_to_text.Speech2TextDecoderLayer"
    )
    attention = "self_attn.{q,k,v}_proj encoder_attn.{q,k,v}_proj? -> self_attn.out_proj encoder_attn.out_proj?"
    mlp = "fc1 -> fc2"
    counts = "{self_attn,encoder_attn}.{num_heads,embed_dim}"


class OPTPolicy(BartPolicy):
    models = "opt.OPTDecoderLayer"
    norm_paths = "self_attn_layer_norm final_layer_norm"


class BartMlpPolicy(ShippedPolicy):
    models = (
        "led.LEDEncoderLayer led.LEDDecoderLayer fsmt.EncoderLayer fsmt.DecoderLayer "
        "bigbird_pegasus.BigBirdPegasusEncoderLayer"
    )
    mlp = BartPolicy.mlp
    whole = "self_attn encoder_attn"


class ProphetNetPolicy(ShippedPolicy):
    models = "prophetnet.ProphetNetEncoderLayer prophetnet.ProphetNetDecoderLayer"
    mlp = "feed_forward.intermediate -> feed_forward.output"
    whole = "self_attn cross_attn"


class DetrPolicy(ShippedPolicy):
    models = "detr.DetrEncoderLayer detr.DetrDecoderLayer"
    attention = "self_attn.{q,k,v}_proj encoder_attn.{q,k,v}_proj? -> self_attn.o_proj encoder_attn.o_proj?"
    mlp = "mlp.fc1 -> mlp.fc2"


class ViTPolicy(ShippedPolicy):
    models = "vit.ViTLayer deit.DeiTLayer"
    attention = "attention.{q,k,v}_proj -> attention.o_proj"
    mlp = "mlp.fc1 -> mlp.fc2"
    counts = "attention.num_attention_heads"


class CLIPPolicy(ShippedPolicy):
    """Of both towers."""

    models = "clip.CLIPEncoderLayer"
    attention = "self_attn.{q,k,v}_proj -> self_attn.out_proj"
    mlp = "mlp.fc1 -> mlp.fc2"
    counts = "self_attn.{num_heads,embed_dim}"


class Wav2Vec2Policy(ShippedPolicy):
    models = (
        "wav2vec2.Wav2Vec2EncoderLayer wav2vec2.Wav2Vec2EncoderLayerStableLayerNorm "
        "hubert.HubertEncoderLayer hubert.HubertEncoderLayerStableLayerNorm"
    )
    attention = "attention.{q,k,v}_proj -> attention.out_proj"
    mlp = "feed_forward.intermediate_dense -> feed_forward.output_dense"
    counts = "attention.{num_heads,embed_dim}"
    whole = "adapter_layer"
    logits = ""  # of letters
