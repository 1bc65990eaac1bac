"""BERT in transformers: BERT itself if it is post-LN, RoBERTa with LayerNorms moved if it is pre-LN, and their relatives;
with rotary positions ModernBERT.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tokenizers import processors

from ...kernels.errors import UserError
from ...kernels.layers.bert_names import BERT_LAYER
from ..config import ModelConfig, ObjectiveConfig
from ..shared.positions_form import GLOBAL, LOCAL, layer_types, rope_parameters, rope_theta, window_keys
from ..shared.transformers_form import WRITTEN_ACTIVATIONS, Architecture, TransformersForm
from .model import NUM_TOKEN_TYPES

if TYPE_CHECKING:
    from ..data.run_tokenizer import RunTokenizer

_PRE_LN_NOTE = """\
Pad to the right: this architecture counts positions without padding, and the training did not know padding on the left.
"""
_PRE_LN_SENTENCES = """\
The sentence head of the training stands beside the weights as `sentence_head`. No class of transformers has a place for it; for
fine-tuning, `AutoModelForSequenceClassification` starts with a new classifier of any number of labels.
"""
_BODY = {
    "word_embeddings": "embeddings.word_embeddings",
    "position_embeddings": "embeddings.position_embeddings",
    "token_type_embeddings": "embeddings.token_type_embeddings",
    "embedding_norm": "embeddings.LayerNorm",
}
_PRE_LN_LAYER = BERT_LAYER | {"attention_norm": ("attention.LayerNorm",), "mlp_norm": ("intermediate.LayerNorm",)}
_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.02,
}
_POST_LN = Architecture(
    model_type="bert",
    fixed={"type": "bert", "pre_layer_norm": False},
    base="bert",
    layers="encoder.layer",
    body=_BODY,
    layer=BERT_LAYER,
    heads={
        "mlm_transform": "cls.predictions.transform.dense",
        "mlm_norm": "cls.predictions.transform.LayerNorm",
        "pooler": "bert.pooler.dense",
        "sentence_classifier": "cls.seq_relationship",
    },
    bias=("cls.predictions.bias",),
    keys={key: (key, default) for key, default in _DEFAULTS.items()},
    features={
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    symbols={"pad_token_id": "pad"},
    ignored=("bert.embeddings.position_ids", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"),
    classes=("BertForMaskedLM", "BertForPreTraining"),
    inputs=("input_ids", "token_type_ids", "attention_mask"),
    sentence_task="nsp",
    token_types=NUM_TOKEN_TYPES,
)


def _roberta(model_type: str, base: str, layer: Mapping[str, tuple[str, ...]], *, pre_layer_norm: bool) -> Architecture:
    return replace(
        _POST_LN,
        model_type=model_type,
        fixed={"type": "bert", "pre_layer_norm": pre_layer_norm},
        base=base,
        body=_BODY | ({"final_norm": "LayerNorm"} if pre_layer_norm else {}),
        layer=layer,
        # Its classes for pretraining have no sentence task, and a head for classification is of whatever task it was tuned for.
        heads={
            "mlm_transform": "lm_head.dense",
            "mlm_norm": "lm_head.layer_norm",
            "pooler": "sentence_head.dense",
            "sentence_classifier": "sentence_head.out_proj",
        },
        # transformers 4 loads the first and then puts the second over it
        bias=("lm_head.bias", "lm_head.decoder.bias"),
        # Their defaults for the last two belong to another vocabulary.
        symbols={**_POST_LN.symbols, "bos_token_id": "cls", "eos_token_id": "sep"},
        ignored=(f"{base}.embeddings.position_ids", "lm_head.decoder.weight", "lm_head.decoder.bias"),
        classes=("RobertaPreLayerNormForMaskedLM",) if pre_layer_norm else (),
        sentence_task="none",
        positions_after_pad=True,
    )


_PRE_LN = _roberta("roberta-prelayernorm", "roberta_prelayernorm", _PRE_LN_LAYER, pre_layer_norm=True)


def _read_modern(config: Mapping[str, Any], obstacles: list[str]) -> dict[str, Any]:
    theta = rope_theta(config, obstacles, "global_rope_theta", 160_000.0, GLOBAL)
    local_theta = rope_theta(config, obstacles, "local_rope_theta", 10_000.0, LOCAL)
    for key, ours, default in (
        ("classifier_activation", "hidden_activation", "gelu"),
        ("classifier_bias", "mlp_bias", False),
    ):
        if config.get(key, default) != config.get(ours, default):
            obstacles.append(f"{key} is {config.get(key, default)!r}, but {ours} {config.get(ours, default)!r}")
    window, every = config.get("local_attention", 128), config.get("global_attn_every_n_layers", 3)
    depth = config.get("num_hidden_layers", 22)
    if config.get("layer_types") is not None:
        windows = window_keys(config["layer_types"], depth, window, obstacles)
    elif every == 1 or depth == 1:
        windows = {}
    else:
        windows = {"sliding_window": window, "global_attn_every_n_layers": every}
    return {"rope_theta": theta, "local_rope_theta": local_theta if windows else None, **windows}


def _write_modern(model: ModelConfig) -> dict[str, Any]:
    local_theta = model.rope_theta if model.local_rope_theta is None else model.local_rope_theta
    local = model.sliding_window is not None
    return {
        "local_attention": model.sliding_window if local else model.max_position_embeddings,
        "layer_types": layer_types(model),
        "rope_parameters": {GLOBAL: rope_parameters(model.rope_theta), LOCAL: rope_parameters(local_theta)},
        "classifier_bias": model.mlp_bias,
        "classifier_activation": WRITTEN_ACTIVATIONS[model.hidden_act],
        # of transformers 4
        "global_rope_theta": model.rope_theta,
        "local_rope_theta": local_theta,
        "global_attn_every_n_layers": (model.global_attn_every_n_layers or model.num_hidden_layers) if local else 1,
    }


_MODERN = Architecture(
    model_type="modernbert",
    fixed={"type": "bert", "pre_layer_norm": True, "position_embedding": "rope", "gated_mlp": True},
    base="model",
    layers="layers",
    body={
        "word_embeddings": "embeddings.tok_embeddings",
        "embedding_norm": "embeddings.norm",
        "final_norm": "final_norm",
    },
    layer={
        "attention_norm": ("attn_norm",),
        "qkv": ("attn.Wqkv",),
        "attention_output": ("attn.Wo",),
        "mlp_norm": ("mlp_norm",),
        "intermediate": ("mlp.Wi",),
        "output": ("mlp.Wo",),
    },
    heads={"mlm_transform": "head.dense", "mlm_norm": "head.norm"},
    bias=("decoder.bias",),
    keys={
        "hidden_size": ("hidden_size", 768),
        "num_hidden_layers": ("num_hidden_layers", 22),
        "num_attention_heads": ("num_attention_heads", 12),
        "intermediate_size": ("intermediate_size", 1152),
        "hidden_act": ("hidden_activation", "gelu"),
        "max_position_embeddings": ("max_position_embeddings", 8192),
        "layer_norm_eps": ("norm_eps", 1e-5),
        "norm_bias": ("norm_bias", False),
        "attention_bias": ("attention_bias", False),
        "mlp_bias": ("mlp_bias", False),
        "hidden_dropout_prob": ("embedding_dropout", 0.0),
        "attention_probs_dropout_prob": ("attention_dropout", 0.0),
        "initializer_range": ("initializer_range", 0.02),
    },
    features={"decoder_bias": True, "tie_word_embeddings": True},
    symbols={
        "pad_token_id": "pad",
        "cls_token_id": "cls",
        "sep_token_id": "sep",
        "bos_token_id": "cls",
        "eos_token_id": "sep",
    },
    ignored=("decoder.weight", "rotary_emb.inv_freq"),
    classes=("ModernBertForMaskedLM",),
    inputs=("input_ids", "attention_mask"),
    read=_read_modern,
    write=_write_modern,
)


def _written_as(model: ModelConfig) -> Architecture:
    if model.position_embedding == "rope":
        return _MODERN
    if not model.pre_layer_norm:
        return _POST_LN
    if model.hidden_act != "gelu":
        raise UserError(
            f"no architecture of transformers computes a pre-LN BERT with model.hidden_act={model.hidden_act}: the head of "
            f"roberta-prelayernorm has gelu; such runs can be exported with pre_layer_norm=false or hidden_act=gelu"
        )
    return _PRE_LN


def _post_processor(tokenizer: "RunTokenizer") -> processors.PostProcessor:
    cls, sep = tokenizer.specials["cls"], tokenizer.specials["sep"]
    return processors.TemplateProcessing(
        single=[cls, "$A", sep],
        pair=[cls, "$A", sep, "$B:1", f"{sep}:1"],
        special_tokens=[(cls, tokenizer.special_id("cls")), (sep, tokenizer.special_id("sep"))],
    )


def _objective(objective: ObjectiveConfig) -> str:
    task = "" if objective.sentence_task == "none" else f"; sentences: {objective.sentence_task}"
    return f"masked tokens, {objective.mlm_probability:.0%} of a sample, by {objective.masking}{task}"


def _notes(model: ModelConfig, objective: ObjectiveConfig) -> list[str]:
    if not model.pre_layer_norm or model.position_embedding == "rope":
        return []
    if objective.sentence_task == "none":
        return [_PRE_LN_NOTE]
    return [_PRE_LN_NOTE, _PRE_LN_SENTENCES]


BERT_IN_TRANSFORMERS = TransformersForm(
    architectures=(
        _POST_LN,
        *(
            _roberta(name, "roberta", BERT_LAYER, pre_layer_norm=False)
            for name in ("roberta", "xlm-roberta", "camembert")
        ),
        _PRE_LN,
        _MODERN,
    ),
    written_as=_written_as,
    generation={},
    padding_side="right",
    post_processor=_post_processor,
    pipeline_tag="fill-mask",
    auto_class="AutoModelForMaskedLM",
    objective=_objective,
    notes=_notes,
)
