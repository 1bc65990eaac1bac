"""What a recipe says of the models of transformers that compute what its own do: parameters, config.json, tokenizer, card."""

from collections.abc import Callable, Mapping
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
    "silu": "silu",
    "swish": "silu",
    "relu2": "relu2",
}
"""Our name of each activation of transformers that a layer here has."""
WRITTEN_ACTIVATIONS: Mapping[Activation, str] = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "silu": "silu",
    "relu2": "relu2",
}
BY_SYMBOL = ("word_embeddings.weight", "lm_head.weight", "mlm_bias")
"""Our parameters with a row for each symbol of the tokenizer."""

_PROJECTION_WEIGHTS = (".qkv.weight", ".attention_output.weight", ".intermediate.weight", ".output.weight")


@dataclass(frozen=True)
class Architecture:
    """Where a kind of transformers model keeps what one of ours has.

    model_type: its name in config.json. fixed: keys of `ModelConfig` that all of its models have alike; `type` is one.
    base: the module around everything but the heads. body: our modules outside the layers, with theirs below `base`. layer: our
        modules of a layer, with theirs below `base`.`layers`.{number}; several are one fused projection of ours. heads: our
        modules, with theirs from the top. bias: of the MLM head; an export has it under every name.
    keys: of `ModelConfig`, with the key of config.json and the value that it has where config.json leaves it out.
    read(config, obstacles), write(model): further keys of `ModelConfig` out of config.json, and further keys of config.json,
        where one does not stand for one. What no model of ours computes is added to the obstacles.
    features: keys of config.json that choose another function, with the only value that is one of ours, and the default.
    symbols: keys of config.json that hold the id of a special token. copies: further keys, with those of `ModelConfig`.
    ignored: ends of the names of parameters that are copies or constants.
    classes: what an export is a model of, without and with a sentence task; none of what is only imported.
    inputs: the tensors that it takes from its tokenizer.
    sentence_task: of a config.json that does not say it.
    token_types: rows of the embedding of token types, 0 where there is none.
    positions_after_pad: position p stands in row pad_token_id + 1 + p.
    transposed: weights of projections are (in, out).
    """

    model_type: str
    fixed: Mapping[str, Any]
    base: str
    layers: str
    body: Mapping[str, str]
    layer: Mapping[str, tuple[str, ...]]
    heads: Mapping[str, str]
    keys: Mapping[str, tuple[str, Any]]
    features: Mapping[str, Any]
    symbols: Mapping[str, SpecialToken]
    ignored: tuple[str, ...]
    inputs: tuple[str, ...]
    bias: tuple[str, ...] = ()
    read: Callable[[Mapping[str, Any], list[str]], dict[str, Any]] = lambda *_: {}
    write: Callable[[ModelConfig], dict[str, Any]] = lambda _: {}
    copies: Mapping[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    sentence_task: str = "none"
    token_types: int = 0
    positions_after_pad: bool = False
    transposed: bool = False

    def parts(self, name: str) -> tuple[str, ...]:
        """Return the parameters of theirs that a parameter of ours is made of along dim 0."""
        if name == "mlm_bias":
            return self.bias[:1]
        module, _, kind = name.rpartition(".")
        if module.startswith("layers."):
            _, number, own = module.split(".")
            return tuple(f"{self.base}.{self.layers}.{number}.{part}.{kind}" for part in self.layer[own])
        theirs = self.heads[module] if module in self.heads else f"{self.base}.{self.body[module]}"
        return (f"{theirs}.{kind}",)

    def is_transposed(self, name: str) -> bool:
        """Return whether they keep this parameter of ours as its transpose."""
        return self.transposed and name.endswith(_PROJECTION_WEIGHTS)

    def first_position(self, config: Mapping[str, Any]) -> int:
        """Return the row of position 0 in their embedding of positions. config: of config.json."""
        return int(config.get("pad_token_id", 1)) + 1 if self.positions_after_pad else 0


@dataclass(frozen=True)
class TransformersForm:
    """The models of a recipe as transformers knows them.

    architectures: all that can be imported. lacked: `model_type` of others, with what no model here computes of them.
    written_as(model): the architecture whose models are closest to a model. Raises UserError if there is none.
    generation: keys of generation_config.json that hold the id of a special token; empty where there is no such file.
    padding_side: where padding stands that does not change what the model says, of a text or going on from one.
    post_processor(tokenizer): what puts the special tokens of a sample around a text; None where samples have none.
    pipeline_tag, auto_class, objective(objective), notes(model, objective): of the model card: the task and class under which
        transformers finds the model, the objective in words, and what its user must know, in paragraphs.
    """

    architectures: tuple[Architecture, ...]
    written_as: Callable[[ModelConfig], Architecture]
    generation: Mapping[str, SpecialToken]
    padding_side: Literal["left", "right"]
    post_processor: "Callable[[RunTokenizer], PostProcessor | None]"
    pipeline_tag: str
    auto_class: str
    objective: Callable[[ObjectiveConfig], str]
    notes: Callable[[ModelConfig, ObjectiveConfig], list[str]]
    lacked: Mapping[str, str] = field(default_factory=dict)
