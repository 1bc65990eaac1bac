"""Our models as transformers writes them: config.json, names and layout of parameters, each from the other.

Nothing here needs transformers, and nothing knows a model: `Recipe.transformers` says what stands where.
"""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from ...kernels.errors import UserError
from .. import RECIPES
from ..config import ModelConfig
from ..data.run_tokenizer import RunTokenizer
from ..shared.transformers_form import ACTIVATIONS, WRITTEN_ACTIVATIONS, Architecture

_OLD_SUFFIXES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # checkpoints of 2018


def _architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a config.json. Raises UserError, naming those there are, if no model of ours computes it."""
    known = {one.model_type: one for recipe in RECIPES.values() for one in recipe.transformers.architectures}
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in known:
        able = f"only {', '.join(known)} compute what a model here does"
        raise UserError(f"config.json has model_type {model_type!r}, and {able}")
    return known[model_type]


def model_config_of(config: Mapping[str, Any]) -> ModelConfig:
    """Return our model that computes what a model with this config.json does; model.vocab_size is theirs.

    Raises UserError, naming all the reasons, if there is none.
    """
    architecture = _architecture_of(config)
    found = {ours: config.get(theirs, default) for ours, (theirs, default) in architecture.keys.items()}
    other = {key: value for key, value in architecture.features.items() if config.get(key, value) != value}
    obstacles = [f"{key} is {config[key]!r}, not {value!r}" for key, value in other.items()]
    activation = ACTIVATIONS.get(str(found["hidden_act"]))
    if activation is None:
        obstacles.append(f"{architecture.keys['hidden_act'][0]} is {found['hidden_act']!r}, not a kind of GELU")
    elif architecture.positions_after_pad and activation != "gelu":
        obstacles.append(f"hidden_act is {found['hidden_act']!r}, but the head has 'gelu'")
    types = architecture.token_types
    if types and config.get("type_vocab_size", types) not in (1, types):
        obstacles.append(f"type_vocab_size is {config['type_vocab_size']}, not {types}")
    if architecture.positions_after_pad and not isinstance(config.get("pad_token_id", 0), int):
        obstacles.append(f"pad_token_id is {config['pad_token_id']!r}, but positions are counted from it")
    if obstacles:
        raise UserError(f"config.json describes what no model here computes: {'; '.join(obstacles)}")
    positions, width = found["max_position_embeddings"], found["hidden_size"]
    if isinstance(positions, int):  # any other value is refused below, as every value of another type
        found["max_position_embeddings"] = positions - architecture.first_position(config)
    if found["intermediate_size"] is None and isinstance(width, int):
        found["intermediate_size"] = 4 * width
    found |= {
        "type": architecture.recipe,
        "hidden_act": activation,
        "pre_layer_norm": architecture.pre_layer_norm,
        "vocab_size": config.get("vocab_size"),
    }
    try:
        return ModelConfig(**found)
    except ValidationError as error:
        wrong = [f"{problem['loc'][0]} is {problem['input']!r}" for problem in error.errors()]
        raise UserError(f"config.json describes no model: {', '.join(dict.fromkeys(wrong))}") from None


def sentence_task_of(config: Mapping[str, Any]) -> str:
    """Return the task of the sentence head in a model with this config.json: nsp, sop or none. Exports say which."""
    return str(config.get("sentence_task", _architecture_of(config).sentence_task))


def config_json(model: ModelConfig, tokenizer: RunTokenizer, sentence_task: str) -> dict[str, Any]:
    """Return config.json of a model of ours with the symbols of its tokenizer.

    Raises UserError if no architecture of transformers computes the model.
    """
    architecture = RECIPES[model.type].transformers.written_as(model)
    classes = architecture.classes
    config: dict[str, Any] = {
        "architectures": [classes[0] if sentence_task == "none" else classes[-1]],
        "model_type": architecture.model_type,
        **{theirs: getattr(model, ours) for ours, (theirs, _) in architecture.keys.items()},
        **architecture.features,
        architecture.keys["hidden_act"][0]: WRITTEN_ACTIVATIONS[model.hidden_act],
        "vocab_size": tokenizer.vocab_size,
        **{theirs: getattr(model, ours) for theirs, ours in architecture.copies.items()},
        **{theirs: tokenizer.special_id(name) for theirs, name in architecture.symbols.items()},
    }
    config[architecture.keys["max_position_embeddings"][0]] += architecture.first_position(config)
    if architecture.token_types:
        config["type_vocab_size"] = architecture.token_types
    if "sentence_classifier" in architecture.heads:
        config["sentence_task"] = sentence_task
    return config


def to_huggingface(state: Mapping[str, Tensor], model: ModelConfig, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of a model of ours under the names of its `config_json`, rows of no symbol cut off.

    Same values and dtype; contiguous, and no two share memory. The head is left out: transformers ties it to the words,
    as it is here.
    """
    architecture = RECIPES[model.type].transformers.written_as(model)
    converted = {}
    for name, parts in architecture.names(model.num_hidden_layers):
        if name not in state:
            continue  # a model without a sentence task has no head for one
        value = state[name]
        if name in ("word_embeddings.weight", "mlm_bias"):
            value = value[: config["vocab_size"]]
        if name == "position_embeddings.weight":
            value = torch.cat([value.new_zeros(architecture.first_position(config), value.shape[1]), value])
        if architecture.is_transposed(name):
            value = value.t()
        for part, piece in zip(parts, value.chunk(len(parts)), strict=True):
            converted[part] = piece.clone(memory_format=torch.contiguous_format)
    for copy in architecture.bias[1:]:
        converted[copy] = converted[architecture.bias[0]].clone()
    return converted


def from_huggingface(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """Their state dict under our names, for the model of `model_config_of(config)`, and what of it was left out.

    state: of a class with heads, or of the body alone. Heads may be missing; the rest may not. The rows of the word embedding
    stay as they are, those of positions begin at position 0, and both token types have a row.
    Raises ValueError for missing parameters.
    """
    architecture = _architecture_of(config)
    state = {_modern(name, architecture.base): tensor for name, tensor in state.items()}
    heads = {*architecture.heads, "mlm_bias"}
    refused = {"pooler", "sentence_classifier"} if sentence_task_of(config) == "none" else set()
    missing, converted, taken = [], {}, set[str]()
    for name, parts in architecture.names(model_config_of(config).num_hidden_layers):
        absent = [part for part in parts if part not in state]
        head = name.split(".")[0]
        if head in refused or (head in heads and absent):
            continue
        missing += absent
        if not missing:
            value = _joined(parts, state)
            converted[name] = value.t().contiguous() if architecture.is_transposed(name) else value
            taken.update(parts)
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise UserError(f"the weights lack {shown}, which a {architecture.model_type} has")
    positions = converted["position_embeddings.weight"]
    converted["position_embeddings.weight"] = positions[architecture.first_position(config) :]
    if architecture.token_types:
        name = "token_type_embeddings.weight"
        if len(converted[name]) == 1:
            converted[name] = converted[name].expand(architecture.token_types, -1)
    return converted, [name for name in state if name not in taken and not name.endswith(architecture.ignored)]


def _joined(parts: tuple[str, ...], state: Mapping[str, Tensor]) -> Tensor:
    """Parameters of equal shape as one, along dim 0."""
    for part in parts:
        if not state[part].is_floating_point():
            remedy = "give the model before quantization"
            raise UserError(f"{part} is {state[part].dtype}, as quantized weights are; {remedy}")
    shapes = {part: tuple(state[part].shape) for part in parts}
    if len(set(shapes.values())) > 1:
        found = ", ".join(f"{part} {shape}" for part, shape in shapes.items())
        raise UserError(f"the weights {found} must have one shape")
    return state[parts[0]] if len(parts) == 1 else torch.cat([state[part] for part in parts])


def _modern(name: str, base: str) -> str:
    """A parameter's name as classes with heads have it today."""
    for old, new in _OLD_SUFFIXES.items():
        name = name.removesuffix(old) + new if name.endswith(old) else name
    from_the_top = (f"{base}.", "cls.", "lm_head.", "classifier.", "sentence_head.")
    return name if name.startswith(from_the_top) else f"{base}.{name}"
