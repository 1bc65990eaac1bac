"""Policies of encoders of text."""

import dataclasses
from typing import Any

from ....kernels.layers.bert_names import BERT_LAYER
from .layer import Description
from .shipped_policy import ShippedPolicy, below, sizes


class BertPolicy(ShippedPolicy):
    layer_class = "bert.modeling_bert.BertLayer"
    optional = ("crossattention",)
    qkv = (*BERT_LAYER["qkv"], *below("crossattention.self", "query", "key", "value"))
    out = (*BERT_LAYER["attention_output"], "crossattention.output.dense")
    wide = BERT_LAYER["intermediate"]
    narrow = BERT_LAYER["output"]
    arguments = (
        *sizes("attention.self", num_attention_heads="num_attention_heads", all_head_size="hidden_size"),
        *sizes("crossattention.self", num_attention_heads="num_attention_heads", all_head_size="hidden_size"),
    )
    norm_paths = (*BERT_LAYER["attention_norm"], *BERT_LAYER["mlp_norm"])
    embedding_paths = ("embeddings.word_embeddings",)
    head_paths = ("predictions.decoder",)

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


class RobertaPolicy(BertPolicy):
    layer_class = "roberta.modeling_roberta.RobertaLayer"
    head_paths = ("lm_head.decoder",)


class XLMRobertaPolicy(RobertaPolicy):
    layer_class = "xlm_roberta.modeling_xlm_roberta.XLMRobertaLayer"


class CamembertPolicy(RobertaPolicy):
    layer_class = "camembert.modeling_camembert.CamembertLayer"


class RobertaPreLayerNormPolicy(RobertaPolicy):
    """Of what `xformer-train export` makes of a pre-LN BERT."""

    layer_class = "roberta_prelayernorm.modeling_roberta_prelayernorm.RobertaPreLayerNormLayer"
    norm_paths = ("attention.LayerNorm", "intermediate.LayerNorm")

    @staticmethod
    def describe(config: Any) -> Description:
        return dataclasses.replace(RobertaPolicy.describe(config), pre_layer_norm=True)


class ElectraPolicy(BertPolicy):
    layer_class = "electra.modeling_electra.ElectraLayer"
    head_paths = ("generator_lm_head",)


class DistilBertPolicy(ShippedPolicy):
    layer_class = "distilbert.modeling_distilbert.TransformerBlock"
    qkv = below("attention", "q_lin", "k_lin", "v_lin")
    out = ("attention.out_lin",)
    wide = ("ffn.lin1",)
    narrow = ("ffn.lin2",)
    arguments = sizes("attention", n_heads="n_heads", dim="dim")
    norm_paths = ("sa_layer_norm", "output_layer_norm")
    embedding_paths = ("embeddings.word_embeddings",)
    head_paths = ("vocab_projector",)

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
    layer_class = "albert.modeling_albert.AlbertLayer"
    qkv = below("attention", "query", "key", "value")
    out = ("attention.dense",)
    wide = ("ffn",)
    narrow = ("ffn_output",)
    arguments = sizes("attention", num_attention_heads="num_attention_heads", all_head_size="hidden_size")
    embedding_paths = ("embeddings.word_embeddings",)
    head_paths = ("predictions.decoder",)


class DebertaV2Policy(ShippedPolicy):
    layer_class = "deberta_v2.modeling_deberta_v2.DebertaV2Layer"
    optional = ("attention.self.pos_",)  # absent where content and position share their projections
    qkv = below("attention.self", "query_proj", "key_proj", "value_proj", "pos_key_proj", "pos_query_proj")
    out = ("attention.output.dense",)
    wide = ("intermediate.dense",)
    narrow = ("output.dense",)
    arguments = sizes("attention.self", num_attention_heads="num_attention_heads", all_head_size="hidden_size")
    embedding_paths = ("embeddings.word_embeddings",)
    head_paths = ("predictions.decoder",)
    whole = ("attention.self.pos_dropout",)  # of the embeddings of distances, which all heads share


class MobileBertPolicy(ShippedPolicy):
    layer_class = "mobilebert.modeling_mobilebert.MobileBertLayer"
    qkv = below("attention.self", "query", "key", "value")
    out = ("attention.output.dense",)
    wide = ("intermediate.dense", "ffn[0].intermediate.dense", "ffn[1].intermediate.dense", "ffn[2].intermediate.dense")
    narrow = ("output.dense", "ffn[0].output.dense", "ffn[1].output.dense", "ffn[2].output.dense")
    optional = ("ffn",)
    arguments = sizes("attention.self", num_attention_heads="num_attention_heads", all_head_size="true_hidden_size")
    whole = ("bottleneck", "output.bottleneck")  # they feed normalizations, which need whole rows
