"""Our models as transformers writes them: config.json, names and layout of parameters, each from the other.

Nothing here needs transformers, and nothing knows a model: `Recipe.transformers` says what stands where.
"""

import json
from collections.abc import Mapping
from typing import Any, get_args

import torch
from pydantic import ValidationError
from torch import Tensor

from ...kernels.errors import UserError
from .. import RECIPES
from ..config import FREE_MODEL_KEYS, LayerFlags, ModelConfig, ObjectiveConfig, SentenceTask
from ..data.run_tokenizer import RunTokenizer
from ..shared.transformers_form import ACTIVATIONS, BY_SYMBOL, WRITTEN_ACTIVATIONS, Architecture

_OLD_SUFFIXES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # checkpoints of 2018
_FREE_KEYS = FREE_MODEL_KEYS | {"vocab_size", "init_from"}


def _architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a config.json. Raises UserError, naming those there are, if no model of ours computes it."""
    forms = [recipe.transformers for recipe in RECIPES.values()]
    known = {one.model_type: one for form in forms for one in form.architectures}
    lacked = {model_type: what for form in forms for model_type, what in form.lacked.items()}
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in known:
        has = f", which has {lacked[model_type]}" if isinstance(model_type, str) and model_type in lacked else ""
        able = f"only {', '.join(known)} compute what a model here does"
        raise UserError(f"config.json has model_type {model_type!r}{has}, and {able}")
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
        key = architecture.keys["hidden_act"][0]
        obstacles.append(f"{key} is {found['hidden_act']!r}, not one of {', '.join(ACTIVATIONS)}")
    elif architecture.positions_after_pad and activation != "gelu":
        obstacles.append(f"hidden_act is {found['hidden_act']!r}, but the head has 'gelu'")
    types = architecture.token_types
    if types and config.get("type_vocab_size", types) not in (1, types):
        obstacles.append(f"type_vocab_size is {config['type_vocab_size']}, not {types}")
    if architecture.positions_after_pad and not isinstance(config.get("pad_token_id", 0), int):
        obstacles.append(f"pad_token_id is {config['pad_token_id']!r}, but positions are counted from it")
    found |= architecture.read(config, obstacles)
    if obstacles:
        reasons = "; ".join(dict.fromkeys(obstacles))
        raise UserError(f"config.json describes what no model here computes: {reasons}")
    positions, width = found["max_position_embeddings"], found["hidden_size"]
    if isinstance(positions, int):  # any other value is refused below, as every value of another type
        found["max_position_embeddings"] = positions - architecture.first_position(config)
    if found["intermediate_size"] is None and isinstance(width, int):
        found["intermediate_size"] = 4 * width
    found |= {**architecture.fixed, "hidden_act": activation, "vocab_size": config.get("vocab_size")}
    try:
        return ModelConfig(**found)
    except ValidationError as error:
        wrong = [f"{problem['loc'][0]} is {problem['input']!r}" for problem in error.errors()]
        raise UserError(f"config.json describes no model: {', '.join(dict.fromkeys(wrong))}") from None


def differing_keys(one: ModelConfig, other: ModelConfig) -> list[str]:
    """Return the keys by which one model computes something else than the other, but for the vocabulary."""
    ours, theirs = _meaning(one), _meaning(other)
    return [key for key in ModelConfig.model_fields if key not in _FREE_KEYS and ours[key] != theirs[key]]


def _meaning(model: ModelConfig) -> dict[str, Any]:
    """Return the values of a model, those of equal effect alike: what null stands for, and what no layer reads."""
    local = [model.is_local(layer) for layer in range(model.num_hidden_layers)]
    mixed, local_theta = any(local) and not all(local), model.local_rope_theta
    theta = model.rope_theta if local_theta is None or not all(local) else local_theta
    return model.model_dump() | {
        "num_key_value_heads": model.key_heads,
        "head_dim": model.head_size,
        "rope_theta": theta,
        "local_rope_theta": local_theta if mixed and local_theta != theta else None,
        "global_attn_every_n_layers": local if mixed else None,
    }


def sentence_task_of(config: Mapping[str, Any]) -> SentenceTask:
    """Return the task of the sentence head of a model with this config.json; exports say which. Raises UserError for others."""
    task = config.get("sentence_task", _architecture_of(config).sentence_task)
    found = next((one for one in get_args(SentenceTask) if one == task), None)
    if found is None:
        raise UserError(
            f"config.json has sentence_task {task!r}; it must be one of {', '.join(get_args(SentenceTask))}"
        )
    return found  # type: ignore[no-any-return]


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
        **architecture.write(model),
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
    _check_written(model, config, sentence_task)
    return config


def _check_written(model: ModelConfig, config: Mapping[str, Any], sentence_task: str) -> None:
    """Raise UserError, naming all keys, unless a model of this config.json computes what the model does."""
    written = model_config_of(config)
    obstacles = [
        f"model.{key} is {shown(getattr(model, key))}, and there it is {shown(getattr(written, key))}"
        for key in differing_keys(model, written)
    ]
    if sentence_task != "none" and "sentence_task" not in config:
        obstacles.append(f"objective.sentence_task is {sentence_task}, and there are no token types and no head for it")
    if obstacles:
        closest = f"no architecture of transformers computes this {model.type}; the closest is {config['model_type']}"
        raise UserError(f"{closest}: {'; '.join(obstacles)}; such runs can be exported with the values there")


def shown(value: object) -> str:
    """Return a value of a run config as YAML has it."""
    return value if isinstance(value, str) else json.dumps(value)


def parameters_of(model: ModelConfig, sentence_task: SentenceTask) -> dict[str, torch.Size]:
    """Return the shapes of a model's parameters by their names."""
    assert isinstance(model.vocab_size, int), "the rows of a trained model are known"
    objective = ObjectiveConfig(sentence_task=sentence_task)
    with torch.device("meta"):
        module = RECIPES[model.type].build_model(model, LayerFlags(), objective, model.vocab_size)
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def to_huggingface(state: Mapping[str, Tensor], model: ModelConfig, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of a model of ours under the names of its `config_json`, rows of no symbol cut off.

    Same values and dtype; contiguous, and no two share memory. A head that is the word embedding is left out: transformers
    ties it, as it is here.
    """
    architecture = RECIPES[model.type].transformers.written_as(model)
    converted = {}
    for name, tensor in state.items():
        parts, value = architecture.parts(name), tensor[: config["vocab_size"]] if name in BY_SYMBOL else tensor
        if name == "position_embeddings.weight":
            value = torch.cat([value.new_zeros(architecture.first_position(config), value.shape[1]), value])
        if architecture.is_transposed(name):
            value = value.t()
        rows = _rows(name, len(parts), model)
        for part, piece in zip(parts, value.split(rows) if rows else (value,), strict=True):
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
    architecture, model = _architecture_of(config), model_config_of(config)
    state = {_modern(name, architecture.base): tensor for name, tensor in state.items()}
    heads = {*architecture.heads, "mlm_bias"}
    missing, converted, taken = [], {}, set[str]()
    for name in parameters_of(model, sentence_task_of(config)):
        parts = architecture.parts(name)
        absent = [part for part in parts if part not in state]
        if absent and name.split(".")[0] in heads:
            continue
        missing += absent
        if not missing:
            value = _joined(parts, state, _rows(name, len(parts), model))
            converted[name] = value.t().contiguous() if architecture.is_transposed(name) else value
            taken.update(parts)
    if missing:
        listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise UserError(f"the weights lack {listed}, which a {architecture.model_type} has")
    positions = converted.get("position_embeddings.weight")
    if positions is not None:
        converted["position_embeddings.weight"] = positions[architecture.first_position(config) :]
    types = converted.get("token_type_embeddings.weight")
    if types is not None and len(types) == 1:
        converted["token_type_embeddings.weight"] = types.expand(architecture.token_types, -1)
    return converted, [name for name in state if name not in taken and not name.endswith(architecture.ignored)]


def _rows(name: str, parts: int, model: ModelConfig) -> list[int]:
    """Return how many rows each of several parts has of a parameter of ours; nothing of what is one part."""
    if parts == 1:
        return []
    if ".qkv." in name:
        keys = model.key_heads * model.head_size
        return [model.num_attention_heads * model.head_size, keys, keys]
    return [model.intermediate_size] * parts


def _joined(parts: tuple[str, ...], state: Mapping[str, Tensor], rows: list[int]) -> Tensor:
    """Parameters with these numbers of rows as one, along dim 0."""
    for part in parts:
        if not state[part].is_floating_point():
            remedy = "give the model before quantization"
            raise UserError(f"{part} is {state[part].dtype}, as quantized weights are; {remedy}")
    if not rows:
        return state[parts[0]]
    shapes = {part: tuple(state[part].shape) for part in parts}
    if list(shapes.values()) != [(size, *shapes[parts[0]][1:]) for size in rows]:
        found = ", ".join(f"{part} {shape}" for part, shape in shapes.items())
        raise UserError(f"the weights {found} must have {', '.join(map(str, rows))} rows of one size by config.json")
    return torch.cat([state[part] for part in parts])


def _modern(name: str, base: str) -> str:
    """A parameter's name as classes with heads have it today."""
    for old, new in _OLD_SUFFIXES.items():
        name = name.removesuffix(old) + new if name.endswith(old) else name
    from_the_top = (f"{base}.", "cls.", "lm_head.", "classifier.", "sentence_head.", "head.", "decoder.", "score.")
    return name if name.startswith(from_the_top) else f"{base}.{name}"
