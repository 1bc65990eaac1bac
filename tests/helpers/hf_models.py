"""Small models of transformers with random weights, one for each shipped policy, and inputs that hold padding."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from xformer_train.recipes.policies.swapping.fused_layer import CACHE_NAMES

VOCABULARY = 53  # odd: neither 2 nor 4 processes share it equally


@dataclass(frozen=True)
class Small:
    """A model class, one of transformers by name, the fields of its config, and a function that makes the forward's arguments.

    policy: of a config, None: the shipped one. training: whether the model has gradients in training mode alone.
    """

    model: str | type[torch.nn.Module]
    fields: dict[str, Any]
    inputs: Callable[[torch.Generator], dict[str, Any]]
    policy: Callable[[Any], Any] | None = None
    training: bool = False

    def build(self, seed: int = 0, **fields: Any) -> torch.nn.Module:
        """The model in its mode, weights drawn with the seed; biases too, which would be zero."""
        import transformers

        transformers.logging.set_verbosity_error()
        cls: Any = getattr(transformers, self.model) if isinstance(self.model, str) else self.model
        torch.manual_seed(seed)
        model = cls(cls.config_class(**self.fields | fields))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1 if parameter.dim() == 1 else 0.05)
        model.tie_weights()
        return model.train(self.training)

    def make_inputs(self, seed: int = 1) -> dict[str, Any]:
        return self.inputs(torch.Generator().manual_seed(seed))


def cache_of(output: Any) -> dict[str, Any]:
    """The output's cache of keys and values, as the argument of the next call."""
    (name,) = set(CACHE_NAMES) & set(output)
    return {name: output[name]}


def text(generator: torch.Generator, left: bool = False, first: int = 3) -> dict[str, Any]:
    """Two rows of eight tokens, the second with three tokens of padding; labels on the tokens."""
    ids = torch.randint(first, VOCABULARY, (2, 8), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    if not left:
        mask = mask.flip(1)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def pair(generator: torch.Generator) -> dict[str, Any]:
    """A source with padding, and a target of six tokens."""
    source = text(generator)
    return source | {"labels": torch.randint(3, VOCABULARY, (2, 6), generator=generator)}


def image(generator: torch.Generator) -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator), "labels": torch.tensor([0, 1])}


def image_and_text(generator: torch.Generator) -> dict[str, Any]:
    words = text(generator)
    words.pop("labels")
    words["input_ids"][:, -1] = VOCABULARY - 1  # the end, whose state stands for the text
    return words | {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator), "return_loss": True}


def speech(generator: torch.Generator) -> dict[str, Any]:
    mask = torch.ones(2, 160, dtype=torch.long)
    mask[1, 120:] = 0
    return {
        "input_values": torch.randn(2, 160, generator=generator),
        "attention_mask": mask,
        "labels": torch.randint(1, 12, (2, 4), generator=generator),
    }


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
WORDS = {"vocab_size": VOCABULARY, "max_position_embeddings": 32}
BERT = WORDS | SIZES | {"pad_token_id": 1, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
ENDS = {"bos_token_id": 0, "eos_token_id": 2}
SEQ2SEQ = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "pad_token_id": 1,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    **WORDS,
    **ENDS,
}
VISION = SIZES | {"image_size": 8, "patch_size": 4}
SPEECH = SIZES | {
    "vocab_size": 12,
    "conv_dim": (8, 8),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "pad_token_id": 0,
    "layerdrop": 0.0,
}
decoder_text = functools.partial(text, left=True)

MODELS: dict[str, Small] = {
    "bert": Small("BertForPreTraining", BERT, lambda g: text(g) | {"next_sentence_label": torch.tensor([0, 1])}),
    "bert_decoder": Small(
        "BertLMHeadModel",
        BERT | {"is_decoder": True, "add_cross_attention": True},
        lambda g: text(g) | {"encoder_hidden_states": torch.randn(2, 5, 16, generator=g)},
    ),
    "roberta": Small("RobertaForMaskedLM", BERT, text),
    "xlm_roberta": Small("XLMRobertaForMaskedLM", BERT, text),
    "camembert": Small("CamembertForMaskedLM", BERT, text),
    "roberta_prelayernorm": Small("RobertaPreLayerNormForMaskedLM", BERT, text),
    "electra": Small("ElectraForMaskedLM", BERT | {"embedding_size": 8}, text),
    "distilbert": Small(
        "DistilBertForMaskedLM", WORDS | {"dim": 16, "n_heads": 4, "n_layers": 2, "hidden_dim": 32}, text
    ),
    "albert": Small("AlbertForMaskedLM", BERT | {"embedding_size": 8}, text),
    "deberta_v2": Small(
        "DebertaV2ForMaskedLM",
        BERT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 4},
        text,
    ),
    "mobilebert": Small("MobileBertForMaskedLM", BERT | {"intra_bottleneck_size": 8, "embedding_size": 8}, text),
    "gpt2": Small(
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 16, "n_head": 4, "n_layer": 2, **ENDS},
        decoder_text,
    ),
    "gpt2_cross": Small(
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCABULARY,
            "n_positions": 32,
            "n_embd": 16,
            "n_head": 4,
            "n_layer": 1,
            "add_cross_attention": True,
            **ENDS,
        },
        lambda g: decoder_text(g) | {"encoder_hidden_states": torch.randn(2, 5, 16, generator=g)},
    ),
    "gpt_neo": Small(
        "GPTNeoForCausalLM",
        WORDS
        | ENDS
        | {
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
        },
        decoder_text,
    ),
    "gptj": Small(
        "GPTJForCausalLM",
        {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 16, "n_head": 4, "n_layer": 2, "rotary_dim": 4, **ENDS},
        decoder_text,
    ),
    "gpt_neox": Small("GPTNeoXForCausalLM", WORDS | SIZES | ENDS, decoder_text),
    "opt": Small(
        "OPTForCausalLM",
        WORDS | SIZES | ENDS | {"ffn_dim": 32, "word_embed_proj_dim": 16, "pad_token_id": 1},
        decoder_text,
    ),
    "llama": Small("LlamaForCausalLM", WORDS | SIZES | ENDS | {"num_key_value_heads": 2}, decoder_text),
    "t5": Small(
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "d_kv": 4,
            "d_ff": 32,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        pair,
    ),
    "t5_gated": Small(
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "d_kv": 8,  # heads wider together than the hidden size
            "d_ff": 32,
            "num_layers": 1,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "decoder_start_token_id": 0,
        },
        pair,
    ),
    "bart": Small("BartForConditionalGeneration", SEQ2SEQ, pair),
    "mbart": Small("MBartForConditionalGeneration", SEQ2SEQ | {"scale_embedding": True}, pair),
    "pegasus": Small("PegasusForConditionalGeneration", SEQ2SEQ, pair),
    "marian": Small("MarianMTModel", SEQ2SEQ, pair),
    "vit": Small("ViTForImageClassification", VISION, image),
    "deit": Small("DeiTForImageClassification", VISION, image),
    "clip": Small(
        "CLIPModel",
        {
            "text_config": WORDS | SIZES | ENDS | {"eos_token_id": VOCABULARY - 1},
            "vision_config": VISION,
            "projection_dim": 8,
        },
        image_and_text,
    ),
    "wav2vec2": Small("Wav2Vec2ForCTC", SPEECH, speech),
    "wav2vec2_stable": Small(
        "Wav2Vec2ForCTC", SPEECH | {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}, speech
    ),
    "hubert": Small("HubertForCTC", SPEECH, speech),
    "hubert_stable": Small(
        "HubertForCTC", SPEECH | {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}, speech
    ),
}
