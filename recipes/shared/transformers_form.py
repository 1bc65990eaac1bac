"""What a recipe says of the models of transformers that compute what its own do: parameters, config.json, tokenizer, card."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ...kernels.ops.choices import Activation
from ..config import ModelConfig, ObjectiveConfig, SpecialToken

if TYPE_CHECKING:
    from tokenizers.processors import PostProcessor

    from ..data.run_tokenizer import RunTokenizer

ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
}
"""Our name of each activation of transformers that is a GELU."""
WRITTEN_ACTIVATIONS: Mapping[Activation, str] = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}

_PROJECTION_WEIGHTS = (".qkv.weight", ".attention_output.weight", ".intermediate.weight", ".output.weight")
_EMBEDDINGS = ("word_embeddings", "position_embeddings", "token_type_embeddings")


@dataclass(frozen=True)
class Architecture:
    """Where a kind of transformers model keeps what one of ours has.

    model_type: its name in config.json. recipe: `model.type`. base: the module around everything but the heads. body: our
        modules outside the layers, with theirs below `base`. layer: our modules of a layer, with theirs below
        `base`.`layers`.{number}; three are one fused projection of ours. heads: our modules, with theirs from the top. bias: of
        the MLM head; an export has it under every name.
    keys: of `ModelConfig`, with the key of config.json and the value that it has where config.json leaves it out.
    features: keys of config.json that choose another function, with the only value that is one of ours, and the default.
    symbols: keys of config.json that hold the id of a special token. copies: further keys, with those of `ModelConfig`.
    ignored: ends of the names of parameters that are copies or constants.
    classes: what an export is a model of, without and with a sentence task; none of what is only imported.
    sentence_task: of a config.json that does not say it.
    token_types: rows of the embedding of token types, 0 where there is none.
    positions_after_pad: position p stands in row pad_token_id + 1 + p.
    transposed: weights of projections are (in, out).
    """

    model_type: str
    recipe: str
    pre_layer_norm: bool
    base: str
    layers: str
    body: Mapping[str, str]
    layer: Mapping[str, tuple[str, ...]]
    heads: Mapping[str, str]
    bias: tuple[str, ...]
    keys: Mapping[str, tuple[str, Any]]
    features: Mapping[str, Any]
    symbols: dict[str, SpecialToken]
    ignored: tuple[str, ...]
    copies: Mapping[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    sentence_task: str = "none"
    token_types: int = 0
    positions_after_pad: bool = False
    transposed: bool = False

    def names(self, depth: int) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yield each parameter of ours in a model of `depth` layers, and the parameters it is made of along dim 0."""
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
        """Return whether they keep this parameter of ours as its transpose."""
        return self.transposed and name.endswith(_PROJECTION_WEIGHTS)

    def first_position(self, config: Mapping[str, Any]) -> int:
        """Return the row of position 0 in their embedding of positions. config: of config.json."""
        return int(config.get("pad_token_id", 1)) + 1 if self.positions_after_pad else 0


@dataclass(frozen=True)
class TransformersForm:
    """The models of a recipe as transformers knows them.

    architectures: all that can be imported. written_as(model): the one that an export of a model is. Raises UserError if no
        architecture computes what the model does.
    inputs: the tensors that a model takes from its tokenizer.
    generation: keys of generation_config.json that hold the id of a special token; empty where there is no such file.
    padding_side: where padding stands that does not change what the model says, of a text or going on from one.
    post_processor(tokenizer): what puts the special tokens of a sample around a text; None where samples have none.
    pipeline_tag, auto_class, objective(objective), notes(model, objective): of the model card: the task and class under which
        transformers finds the model, the objective in words, and what its user must know, in paragraphs.
    """

    architectures: tuple[Architecture, ...]
    written_as: Callable[[ModelConfig], Architecture]
    inputs: tuple[str, ...]
    generation: Mapping[str, SpecialToken]
    padding_side: Literal["left", "right"]
    post_processor: "Callable[[RunTokenizer], PostProcessor | None]"
    pipeline_tag: str
    auto_class: str
    objective: Callable[[ObjectiveConfig], str]
    notes: Callable[[ModelConfig, ObjectiveConfig], list[str]]
