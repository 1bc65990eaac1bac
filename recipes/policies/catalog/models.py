"""The shipped policies: where transformers' models keep their projections.

A family names all models whose layers have the same modules. Attention stays whole where it draws or reshapes what belongs to
all heads together.
"""

from dataclasses import replace

from .shipped_policy import Family

_BERT_DESCRIPTION = {
    "activation": "hidden_act",
    "layer_norm_eps": "layer_norm_eps",
    "pre_layer_norm": False,
    "causal": "is_decoder",
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
}
_BERT = Family(
    "bert.BertLayer electra.ElectraLayer ernie.ErnieLayer roberta.RobertaLayer xlm_roberta.XLMRobertaLayer "
    "camembert.CamembertLayer",
    "attention.self.{query,key,value} crossattention.self.{query,key,value}? -> "
    "attention.output.dense crossattention.output.dense?",
    "intermediate.dense -> output.dense",
    counts="{attention,crossattention}.self.{num_attention_heads,all_head_size}",
    norms="attention.output.LayerNorm output.LayerNorm",
    description=_BERT_DESCRIPTION,
)
# Of layers with BERT's modules that compute otherwise, or give back a tuple.
_BERT_LIKE = replace(
    _BERT,
    models="megatron_bert.MegatronBertLayer rembert.RemBertLayer roformer.RoFormerLayer tapas.TapasLayer "
    "xlm_roberta_xl.XLMRobertaXLLayer bert_generation.BertGenerationLayer visual_bert.VisualBertLayer "
    "layoutlm.LayoutLMLayer data2vec.modeling_data2vec_text.Data2VecTextLayer",
    norms="",
    description=None,
)
_DEBERTA_V2 = replace(
    _BERT_LIKE,
    models="deberta_v2.DebertaV2Layer",
    # Positions may use the projections of queries and keys.
    attention="attention.self.{query,key,value}_proj attention.self.pos_{key,query}_proj? -> attention.output.dense",
    counts="attention.self.{num_attention_heads,all_head_size}",
    whole="attention.self.pos_dropout",  # of the embeddings of distances, which all heads share
)
_BART = Family(
    "bart.BartEncoderLayer bart.BartDecoderLayer mbart.MBartEncoderLayer mbart.MBartDecoderLayer "
    "pegasus.PegasusEncoderLayer pegasus.PegasusDecoderLayer marian.MarianEncoderLayer marian.MarianDecoderLayer "
    "blenderbot.BlenderbotEncoderLayer blenderbot.BlenderbotDecoderLayer xglm.XGLMDecoderLayer "
    "blenderbot_small.BlenderbotSmallEncoderLayer blenderbot_small.BlenderbotSmallDecoderLayer "
    "m2m_100.M2M100EncoderLayer m2m_100.M2M100DecoderLayer bigbird_pegasus.BigBirdPegasusDecoderLayer "
    "speech_to_text.Speech2TextEncoderLayer speech_to_text.Speech2TextDecoderLayer",
    "self_attn.{q,k,v}_proj encoder_attn.{q,k,v}_proj? -> self_attn.out_proj encoder_attn.out_proj?",
    "fc1 -> fc2",
    counts="{self_attn,encoder_attn}.{num_heads,embed_dim}",
)
_LLAMA = Family(
    "llama.LlamaDecoderLayer",
    "self_attn.{q,k,v}_proj -> self_attn.o_proj",
    "mlp.{gate,up}_proj -> mlp.down_proj",
    norms="input_layernorm post_attention_layernorm",
    description={
        "activation": "hidden_act",
        "layer_norm_eps": "rms_norm_eps",
        "pre_layer_norm": True,
        "causal": True,
        "hidden_dropout": 0.0,
        "attention_dropout": "attention_dropout",
        "rms_norm": True,
        "gated_mlp": True,
        "rotary": True,
    },
)

FAMILIES = (
    _BERT,
    replace(  # what `xformer-train export` makes of a pre-LN BERT
        _BERT,
        models="roberta_prelayernorm.RobertaPreLayerNormLayer",
        norms="attention.LayerNorm intermediate.LayerNorm",
        description=_BERT_DESCRIPTION | {"pre_layer_norm": True},
    ),
    _BERT_LIKE,
    replace(  # whose words are of a class that is no nn.Embedding
        _BERT_LIKE, models="ibert.IBertLayer", words="", logits=""
    ),
    replace(
        _BERT_LIKE,
        models="luke.LukeLayer",
        attention="attention.self.{query,key,value,w2e_query,e2w_query,e2e_query} -> attention.output.dense",
        counts="attention.self.{num_attention_heads,all_head_size}",
    ),
    replace(_BERT_LIKE, models="lxmert.LxmertLayer", counts="attention.self.{num_attention_heads,head_size}"),
    Family(
        "lxmert.LxmertXLayer",
        "{visual_attention.att,lang_self_att.self,visn_self_att.self}.{query,key,value} -> "
        "{visual_attention,lang_self_att,visn_self_att}.output.dense",
        "{lang,visn}_inter.dense -> {lang,visn}_output.dense",
        counts="{visual_attention.att,lang_self_att.self,visn_self_att.self}.{num_attention_heads,head_size}",
    ),
    replace(
        _BERT_LIKE,
        models="mpnet.MPNetLayer",
        attention="attention.attn.{q,k,v} -> attention.attn.o",
        counts="attention.attn.{num_attention_heads,all_head_size}",
    ),
    Family("mpnet.MPNetEncoder", "relative_attention_bias? ->", counts="n_heads"),  # which the layers are given
    replace(
        _DEBERTA_V2,
        models="deberta.DebertaLayer",
        # The first is fused head by head.
        attention="attention.self.in_proj attention.self.{pos_proj,pos_q_proj}? -> attention.output.dense",
        biases="attention.self.{q,v}_bias",
    ),
    _DEBERTA_V2,
    replace(
        _BERT_LIKE,
        models="mobilebert.MobileBertLayer",
        mlp="intermediate.dense ffn[{0,1,2}].intermediate.dense? -> output.dense ffn[{0,1,2}].output.dense?",
        whole="bottleneck output.bottleneck",  # they feed normalizations, which need whole rows
        words="",
        logits="",  # made of two tensors
    ),
    Family(
        "big_bird.BigBirdLayer convbert.ConvBertLayer longformer.LongformerLayer",
        mlp=_BERT.mlp,
        whole="attention crossattention",
    ),
    Family(
        "distilbert.TransformerBlock",
        "attention.{q,k,v}_lin -> attention.out_lin",
        "ffn.lin1 -> ffn.lin2",
        counts="attention.{n_heads,dim}",
        norms="sa_layer_norm output_layer_norm",
        description={
            "activation": "activation",
            "layer_norm_eps": 1e-12,  # written in the layer, not in the config
            "pre_layer_norm": False,
            "causal": False,
            "hidden_dropout": "dropout",
            "attention_dropout": "attention_dropout",
            "drops_attention_output": False,
        },
    ),
    Family(
        "albert.AlbertLayer",
        "attention.{query,key,value} -> attention.dense",
        "ffn -> ffn_output",
        counts="attention.{num_attention_heads,all_head_size}",
    ),
    Family("xlnet.XLNetLayer", mlp="ff.layer_1 -> ff.layer_2", whole="rel_attn"),
    Family("funnel.FunnelLayer", mlp="ffn.linear_1 -> ffn.linear_2", whole="attention"),
    Family("xlm.MultiHeadAttention flaubert.MultiHeadAttention", "{q,k,v}_lin -> out_lin", counts="dim n_heads"),
    Family("xlm.TransformerFFN flaubert.TransformerFFN", mlp="lin1 -> lin2"),
    Family(
        "reformer.ReformerLayer",
        "attention.self_attention.{query_key,query,key}? attention.self_attention.value -> attention.output.dense",
        "feed_forward.dense.dense -> feed_forward.output.dense",
        counts="attention.self_attention.{num_attention_heads,all_head_size}",
    ),
    Family("openai.Block", "attn.c_attn*3 -> attn.c_proj", "mlp.c_fc -> mlp.c_proj", counts="attn.{n_head,split_size}"),
    Family(
        "gpt2.GPT2Block",
        "attn.c_attn*3 crossattention.c_attn*2? crossattention.q_attn? -> attn.c_proj crossattention.c_proj?",
        "mlp.c_fc -> mlp.c_proj",
        counts="{attn,crossattention}.{num_heads,embed_dim,split_size}",
        norms="ln_1 ln_2",
        description={
            "activation": "activation_function",
            "layer_norm_eps": "layer_norm_epsilon",
            "pre_layer_norm": True,
            "causal": True,
            "hidden_dropout": "resid_pdrop",
            "attention_dropout": "attn_pdrop",
        },
    ),
    Family(
        "gpt_neo.GPTNeoBlock",
        "attn.attention.{q,k,v}_proj -> attn.attention.out_proj",
        "mlp.c_fc -> mlp.c_proj",
        counts="attn.attention.{num_heads,embed_dim}",
        norms="ln_1 ln_2",
    ),
    Family(
        "gptj.GPTJBlock",
        "attn.{q,k,v}_proj -> attn.out_proj",
        "mlp.fc_in -> mlp.fc_out",
        counts="attn.{num_attention_heads,embed_dim}",
        norms="ln_1",
    ),
    Family(
        "gpt_neox.GPTNeoXLayer",
        "attention.query_key_value -> attention.dense",  # fused head by head
        "mlp.dense_h_to_4h -> mlp.dense_4h_to_h",
        norms="input_layernorm post_attention_layernorm",
    ),
    Family(
        "ctrl.EncoderLayer",
        "multi_head_attention.W{q,k,v} -> multi_head_attention.dense",
        "ffn[0] -> ffn[2]",
        counts="multi_head_attention.{num_heads,d_model_size}",
    ),
    _LLAMA,
    replace(_LLAMA, models="mistral.MistralDecoderLayer", window="self_attn.config.sliding_window"),
    replace(
        _LLAMA,
        models="qwen3.Qwen3DecoderLayer",
        head_norms="self_attn.{q,k}_norm",
        window="self_attn.sliding_window",
    ),
    Family(
        "modernbert.ModernBertEncoderLayer",
        "attn.Wqkv*3 -> attn.Wo",
        "mlp.Wi*2 -> mlp.Wo",
        norms="attn_norm? mlp_norm",  # the first layer reads the norm of the embeddings
        window="attn.sliding_window",
        words="tok_embeddings",
        logits="decoder",
        description={
            "activation": "hidden_activation",
            "layer_norm_eps": "norm_eps",
            "pre_layer_norm": True,
            "causal": False,
            # Theirs stand elsewhere in the layer, and are zero by default.
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "gated_mlp": True,
            "rotary": True,
        },
    ),
    Family(
        "t5.T5Block mt5.MT5Block",
        "layer[0].SelfAttention.{q,k,v} layer[0].SelfAttention.relative_attention_bias? layer[1].EncDecAttention.{q,k,v}? -> "
        "layer[0].SelfAttention.o layer[1].EncDecAttention.o?",
        "layer[-1].DenseReluDense.{wi,wi_0,wi_1}? -> layer[-1].DenseReluDense.wo",
        counts="{layer[0].SelfAttention,layer[1].EncDecAttention}.{n_heads,inner_dim}",
    ),
    _BART,
    replace(_BART, models="opt.OPTDecoderLayer", norms="self_attn_layer_norm final_layer_norm"),
    Family(
        "led.LEDEncoderLayer led.LEDDecoderLayer fsmt.EncoderLayer fsmt.DecoderLayer "
        "bigbird_pegasus.BigBirdPegasusEncoderLayer",
        mlp=_BART.mlp,
        whole="self_attn encoder_attn",
    ),
    Family(
        "prophetnet.ProphetNetEncoderLayer prophetnet.ProphetNetDecoderLayer",
        mlp="feed_forward.intermediate -> feed_forward.output",
        whole="self_attn cross_attn",
    ),
    Family(
        "detr.DetrEncoderLayer detr.DetrDecoderLayer",
        "self_attn.{q,k,v}_proj encoder_attn.{q,k,v}_proj? -> self_attn.o_proj encoder_attn.o_proj?",
        "mlp.fc1 -> mlp.fc2",
    ),
    Family(
        "vit.ViTLayer deit.DeiTLayer",
        "attention.{q,k,v}_proj -> attention.o_proj",
        "mlp.fc1 -> mlp.fc2",
        counts="attention.num_attention_heads",
    ),
    Family(  # both towers
        "clip.CLIPEncoderLayer",
        "self_attn.{q,k,v}_proj -> self_attn.out_proj",
        "mlp.fc1 -> mlp.fc2",
        counts="self_attn.{num_heads,embed_dim}",
    ),
    Family(
        "wav2vec2.Wav2Vec2EncoderLayer wav2vec2.Wav2Vec2EncoderLayerStableLayerNorm "
        "hubert.HubertEncoderLayer hubert.HubertEncoderLayerStableLayerNorm",
        "attention.{q,k,v}_proj -> attention.out_proj",
        "feed_forward.intermediate_dense -> feed_forward.output_dense",
        counts="attention.{num_heads,embed_dim}",
        whole="adapter_layer",
        logits="",  # of letters
    ),
)
