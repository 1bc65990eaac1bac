"""Small models whose shipped policy is another's or a short one: tested for outputs, gradients and state alone."""

from typing import Any

import torch
from helpers.hf_models import BERT, ENDS, SEQ2SEQ, SIZES, VOCABULARY, WORDS, Small, decoder_text, pair, text


def entities(generator: torch.Generator) -> dict[str, Any]:
    """A text with two entities, the second row's second one of padding."""
    return text(generator) | {
        "entity_ids": torch.tensor([[1, 2], [3, 0]]),
        "entity_attention_mask": torch.tensor([[1, 1], [1, 0]]),
        "entity_position_ids": torch.tensor([[[1, 2, -1], [3, -1, -1]], [[0, 1, -1], [-1, -1, -1]]]),
    }


def text_and_regions(generator: torch.Generator) -> dict[str, Any]:
    """A text, and features of three regions of an image behind it."""
    words = text(generator)
    words["labels"] = torch.cat([words["labels"], torch.full((2, 3), -100)], 1)
    regions = {"visual_embeds": torch.randn(2, 3, 6, generator=generator), "visual_attention_mask": torch.ones(2, 3)}
    return words | regions | {"sentence_image_labels": torch.tensor([0, 1])}


def text_beside_regions(generator: torch.Generator) -> dict[str, Any]:
    regions = {
        "visual_feats": torch.randn(2, 3, 6, generator=generator),
        "visual_pos": torch.rand(2, 3, 4, generator=generator),
    }
    return text(generator) | regions | {"matched_label": torch.tensor([0, 1])}


def spectrum(generator: torch.Generator) -> dict[str, Any]:
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, 12:] = 0
    return {
        "input_features": torch.randn(2, 16, 8, generator=generator),
        "attention_mask": mask,
        "labels": torch.randint(3, VOCABULARY, (2, 6), generator=generator),
    }


_RESNET = {
    "model_type": "resnet",
    "embedding_size": 4,
    "hidden_sizes": [4, 8],
    "depths": [1, 1],
    "out_features": ["stage2"],
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_XLM = {
    "n_words": VOCABULARY,
    "emb_dim": 16,
    "n_layers": 2,
    "n_heads": 4,
    "pad_index": 1,
    "max_position_embeddings": 32,
}
_GPT = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 16, "n_head": 4, "n_layer": 2}
_CHUNKS = {
    "attn_layers": ["local", "local"],
    "local_attn_chunk_length": 4,
    "hidden_dropout_prob": 0.0,
    "local_attention_probs_dropout_prob": 0.0,
    "pad_token_id": 1,
}
_AXES = {"axial_pos_shape": [2, 4], "axial_pos_embds_dim": [8, 8], "max_position_embeddings": 8, "is_decoder": True}
_VISUAL = {
    "l_layers": 1,
    "x_layers": 1,
    "r_layers": 1,
    "visual_feat_dim": 6,
    "task_qa": False,
    "task_obj_predict": False,
}
_WINDOWS = {"attention_window": 4, "max_encoder_position_embeddings": 32, "max_decoder_position_embeddings": 32}

_SHARED_KEYS = WORDS | SIZES | ENDS | {"num_key_value_heads": 2}

SIMILAR_MODELS: dict[str, Small] = {
    "mistral": Small("MistralForCausalLM", _SHARED_KEYS | {"sliding_window": 4}, decoder_text),
    "qwen3": Small(
        "Qwen3ForCausalLM",
        _SHARED_KEYS | {"head_dim": 8, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        decoder_text,
    ),
    "modernbert": Small(
        "ModernBertForMaskedLM",
        WORDS
        | SIZES
        | {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
        | {"local_attention": 6, "global_attn_every_n_layers": 2},
        text,
    ),
    "ernie": Small("ErnieForMaskedLM", BERT, text),
    "layoutlm": Small("LayoutLMForMaskedLM", BERT | {"max_2d_position_embeddings": 8}, text),
    "tapas": Small("TapasForMaskedLM", BERT | {"type_vocab_sizes": [3, 4, 4, 2, 4, 4, 2]}, text),
    "data2vec": Small("Data2VecTextForMaskedLM", BERT, text),
    "megatron_bert": Small("MegatronBertForMaskedLM", BERT, text),
    "rembert": Small("RemBertForMaskedLM", BERT | {"input_embedding_size": 8, "output_embedding_size": 12}, text),
    "roformer": Small("RoFormerForMaskedLM", BERT, text),
    "luke": Small("LukeForMaskedLM", BERT | {"entity_vocab_size": 9, "entity_emb_size": 8}, entities),
    "xlm_roberta_xl": Small("XLMRobertaXLForMaskedLM", BERT, text),
    "bert_generation": Small("BertGenerationDecoder", BERT | {"is_decoder": True}, text),
    "visual_bert": Small("VisualBertForPreTraining", BERT | {"visual_embedding_dim": 6}, text_and_regions),
    "lxmert": Small("LxmertForPreTraining", BERT | _VISUAL, text_beside_regions),
    "big_bird": Small("BigBirdForMaskedLM", BERT | {"attention_type": "original_full"}, text),
    "convbert": Small("ConvBertForMaskedLM", BERT | {"embedding_size": 8, "conv_kernel_size": 3}, text),
    "longformer": Small(
        "LongformerForMaskedLM",
        BERT | {"attention_window": 4},
        lambda g: text(g) | {"global_attention_mask": torch.eye(8).long()[:1].repeat(2, 1)},
    ),
    "ibert": Small("IBertForMaskedLM", BERT, text),
    "mpnet": Small("MPNetForMaskedLM", BERT, text),
    "deberta": Small("DebertaForMaskedLM", BERT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, text),
    "detr": Small(
        "DetrModel",
        SEQ2SEQ | {"use_timm_backbone": False, "backbone": None, "backbone_config": _RESNET, "num_queries": 5},
        lambda g: {"pixel_values": torch.randn(2, 3, 16, 16, generator=g)},
    ),
    "xlnet": Small(
        "XLNetLMHeadModel",
        {"vocab_size": VOCABULARY, "d_model": 16, "n_layer": 2, "n_head": 4, "d_inner": 32, "pad_token_id": 1},
        text,
    ),
    "funnel": Small(
        "FunnelForMaskedLM",
        {"vocab_size": VOCABULARY, "block_sizes": [1, 1], "d_model": 16, "n_head": 4, "d_head": 4, "d_inner": 32},
        text,
    ),
    "xlm": Small("XLMWithLMHeadModel", _XLM, text),
    "flaubert": Small("FlaubertWithLMHeadModel", _XLM, text),
    "reformer": Small(
        "ReformerModelWithLMHead",
        WORDS
        | {
            "hidden_size": 16,
            "num_attention_heads": 4,
            "attention_head_size": 4,
            "feed_forward_size": 32,
            **_CHUNKS,
            **_AXES,
        },
        decoder_text,
        training=True,
    ),
    "openai": Small("OpenAIGPTLMHeadModel", _GPT, decoder_text),
    "ctrl": Small("CTRLLMHeadModel", _GPT | {"dff": 32}, decoder_text),
    "xglm": Small(
        "XGLMForCausalLM", WORDS | {"d_model": 16, "ffn_dim": 32, "num_layers": 2, "attention_heads": 4}, decoder_text
    ),
    "mt5": Small("MT5ForConditionalGeneration", _T5, pair),
    "blenderbot": Small("BlenderbotForConditionalGeneration", SEQ2SEQ, pair),
    "blenderbot_small": Small("BlenderbotSmallForConditionalGeneration", SEQ2SEQ, pair),
    "m2m_100": Small("M2M100ForConditionalGeneration", SEQ2SEQ, pair),
    "speech_to_text": Small(
        "Speech2TextForConditionalGeneration",
        SEQ2SEQ
        | {"input_feat_per_channel": 8, "conv_channels": 8, "max_source_positions": 32, "max_target_positions": 32},
        spectrum,
    ),
    "bigbird_pegasus": Small(
        "BigBirdPegasusForConditionalGeneration", SEQ2SEQ | {"attention_type": "original_full"}, pair
    ),
    "led": Small(
        "LEDForConditionalGeneration",
        {name: value for name, value in SEQ2SEQ.items() if name != "max_position_embeddings"} | _WINDOWS,
        pair,
    ),
    "fsmt": Small(
        "FSMTForConditionalGeneration",
        {name: value for name, value in SEQ2SEQ.items() if name != "vocab_size"}
        | {"langs": ["en", "de"], "src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY},
        lambda g: pair(g) | {"labels": torch.randint(3, VOCABULARY, (2, 8), generator=g)},
    ),
    "prophetnet": Small(
        "ProphetNetForConditionalGeneration",
        WORDS
        | {
            "hidden_size": 16,
            "num_encoder_layers": 1,
            "num_decoder_layers": 1,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
        }
        | {"num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "ngram": 2, "pad_token_id": 1}
        | {"decoder_start_token_id": 2},
        pair,
    ),
}
