"""Architectures of transformers that compute what a model of ours does: names of parameters, keys of config.json."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...kernels.errors import UserError
from ..config import ModelConfig

_PROJECTION_WEIGHTS = (".qkv.weight", ".attention_output.weight", ".intermediate.weight", ".output.weight")
_EMBEDDINGS = ("word_embeddings", "position_embeddings", "token_type_embeddings")


@dataclass(frozen=True)
class Architecture:
    """Where a kind of transformers model keeps what one of ours has.

    model_type: its name in config.json. ours: `model.type`. base: the module around everything but the heads. body: our modules
        outside the layers, with theirs below `base`. layer: our modules of a layer, with theirs below `base`.`layers`.{number};
        three are one fused projection of ours. heads: our modules, with theirs from the top. bias: of the MLM head; an
        export has it under every name.
    keys: of `ModelConfig`, with the key of config.json and the value that it has where config.json leaves it out.
    features: keys of config.json that choose another function, with the only value that is one of ours, and the default.
    ignored: ends of the names of parameters that are copies or constants.
    positions_after_pad: position p stands in row pad_token_id + 1 + p.
    transposed: weights of projections are (in, out).
    """

    model_type: str
    ours: str
    pre_layer_norm: bool
    base: str
    layers: str
    body: Mapping[str, str]
    layer: Mapping[str, tuple[str, ...]]
    heads: Mapping[str, str]
    bias: tuple[str, ...]
    keys: Mapping[str, tuple[str, Any]]
    features: Mapping[str, Any]
    ignored: tuple[str, ...]
    positions_after_pad: bool = False
    transposed: bool = False

    def names(self, depth: int) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Each parameter of ours in a model of `depth` layers, and the parameters it is made of along dim 0."""
        places: dict[str, tuple[str, ...]] = {name: (f"{self.base}.{theirs}",) for name, theirs in self.body.items()}
        for number in range(depth):
            prefix = f"{self.base}.{self.layers}.{number}."
            places |= {
                f"layers.{number}.{name}": tuple(prefix + part for part in parts) for name, parts in self.layer.items()
            }
        places |= {name: (theirs,) for name, theirs in self.heads.items()}
        for name, parts in places.items():
            for kind in ("weight",) if name in _EMBEDDINGS else ("weight", "bias"):
                yield f"{name}.{kind}", tuple(f"{part}.{kind}" for part in parts)
        if self.bias:
            yield "mlm_bias", self.bias[:1]

    def is_transposed(self, name: str) -> bool:
        """Whether they keep this parameter of ours as its transpose."""
        return self.transposed and name.endswith(_PROJECTION_WEIGHTS)

    def first_position(self, config: Mapping[str, Any]) -> int:
        """The row of position 0 in their embedding of positions. config: of config.json."""
        return int(config.get("pad_token_id", 1)) + 1 if self.positions_after_pad else 0


_BERT_BODY = {
    "word_embeddings": "embeddings.word_embeddings",
    "position_embeddings": "embeddings.position_embeddings",
    "token_type_embeddings": "embeddings.token_type_embeddings",
    "embedding_norm": "embeddings.LayerNorm",
}
_BERT_PROJECTIONS = {
    "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention_output": ("attention.output.dense",),
    "intermediate": ("intermediate.dense",),
    "output": ("output.dense",),
}
_POST_LN_LAYER = _BERT_PROJECTIONS | {
    "attention_norm": ("attention.output.LayerNorm",),
    "mlp_norm": ("output.LayerNorm",),
}
_PRE_LN_LAYER = _BERT_PROJECTIONS | {
    "attention_norm": ("attention.LayerNorm",),
    "mlp_norm": ("intermediate.LayerNorm",),
}
_BERT_KEYS: dict[str, tuple[str, Any]] = {
    "hidden_size": ("hidden_size", 768),
    "num_hidden_layers": ("num_hidden_layers", 12),
    "num_attention_heads": ("num_attention_heads", 12),
    "intermediate_size": ("intermediate_size", 3072),
    "hidden_act": ("hidden_act", "gelu"),
    "max_position_embeddings": ("max_position_embeddings", 512),
    "layer_norm_eps": ("layer_norm_eps", 1e-12),
    "hidden_dropout_prob": ("hidden_dropout_prob", 0.1),
    "attention_probs_dropout_prob": ("attention_probs_dropout_prob", 0.1),
    "initializer_range": ("initializer_range", 0.02),
}
_BERT_FEATURES = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
_BERT = Architecture(
    model_type="bert",
    ours="bert",
    pre_layer_norm=False,
    base="bert",
    layers="encoder.layer",
    body=_BERT_BODY,
    layer=_POST_LN_LAYER,
    heads={
        "mlm_transform": "cls.predictions.transform.dense",
        "mlm_norm": "cls.predictions.transform.LayerNorm",
        "pooler": "bert.pooler.dense",
        "sentence_classifier": "cls.seq_relationship",
    },
    bias=("cls.predictions.bias",),
    keys=_BERT_KEYS,
    features=_BERT_FEATURES,
    ignored=("bert.embeddings.position_ids", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"),
)


def _roberta(model_type: str, base: str, layer: Mapping[str, tuple[str, ...]], *, pre_layer_norm: bool) -> Architecture:
    return Architecture(
        model_type=model_type,
        ours="bert",
        pre_layer_norm=pre_layer_norm,
        base=base,
        layers="encoder.layer",
        body=_BERT_BODY | ({"final_norm": "LayerNorm"} if pre_layer_norm else {}),
        layer=layer,
        # Its classes for pretraining have no sentence task; that for classification has pooler and classifier in its head.
        heads={
            "mlm_transform": "lm_head.dense",
            "mlm_norm": "lm_head.layer_norm",
            "pooler": "classifier.dense",
            "sentence_classifier": "classifier.out_proj",
        },
        bias=(
            "lm_head.bias",
            "lm_head.decoder.bias",
        ),  # transformers 4 loads the first and then puts the second over it
        keys=_BERT_KEYS,
        features=_BERT_FEATURES,
        ignored=(f"{base}.embeddings.position_ids", "lm_head.decoder.weight", "lm_head.decoder.bias"),
        positions_after_pad=True,
    )


_ROBERTA_PRE_LN = _roberta("roberta-prelayernorm", "roberta_prelayernorm", _PRE_LN_LAYER, pre_layer_norm=True)
_GPT2 = Architecture(
    model_type="gpt2",
    ours="gpt",
    pre_layer_norm=True,
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
    bias=(),
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
    ignored=("lm_head.weight", ".attn.bias", ".attn.masked_bias"),  # of layers: the causal mask, in old checkpoints
    transposed=True,
)
_ARCHITECTURES = {
    architecture.model_type: architecture
    for architecture in (
        _BERT,
        *(_roberta(name, "roberta", _POST_LN_LAYER, pre_layer_norm=False) for name in ("roberta", "xlm-roberta")),
        _roberta("camembert", "roberta", _POST_LN_LAYER, pre_layer_norm=False),
        _ROBERTA_PRE_LN,
        _GPT2,
    )
}


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a config.json. Raises ValueError, naming those there are, if no model of ours computes it."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _ARCHITECTURES:
        raise UserError(
            f"config.json has model_type {model_type!r}, and only {', '.join(_ARCHITECTURES)} compute what a model here does"
        )
    return _ARCHITECTURES[model_type]


def architecture_for(model: ModelConfig) -> Architecture:
    """The architecture that computes what this model of ours does. Raises ValueError if there is none."""
    if model.type == "gpt":
        return _GPT2
    if not model.pre_layer_norm:
        return _BERT
    if model.hidden_act != "gelu":
        raise UserError(
            f"no architecture of transformers computes a pre-LN BERT with model.hidden_act={model.hidden_act}: the head of "
            f"roberta-prelayernorm has gelu; such runs can be exported with pre_layer_norm=false or hidden_act=gelu"
        )
    return _ROBERTA_PRE_LN
