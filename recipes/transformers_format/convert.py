"""Our models as transformers writes them: config.json, names and layout of parameters, each from the other.

Nothing here needs transformers. hf_architectures.py says what stands where.
"""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from ...kernels.errors import UserError
from ..bert.model import NUM_TOKEN_TYPES
from ..config import ModelConfig
from ..data.tokenizer import RunTokenizer
from .architectures import architecture_for, architecture_of

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
_PUBLISHED_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
# Of what is exported: the class that holds all of a run's weights, without and with a sentence task.
_CLASSES = {
    "bert": ("BertForMaskedLM", "BertForPreTraining"),
    "roberta-prelayernorm": ("RobertaPreLayerNormForMaskedLM",) * 2,
    "gpt2": ("GPT2LMHeadModel",) * 2,
}
_OLD_SUFFIXES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # checkpoints of 2018


def model_config_of(config: Mapping[str, Any]) -> ModelConfig:
    """Our model that computes what a model with this config.json does.

    model.vocab_size is theirs. Raises ValueError, naming all the reasons, if there is none.
    """
    architecture = architecture_of(config)
    found = {ours: config.get(theirs, default) for ours, (theirs, default) in architecture.keys.items()}
    obstacles = [
        f"{key} is {config[key]!r}, not {value!r}"
        for key, value in architecture.features.items()
        if config.get(key, value) != value
    ]
    activation = _ACTIVATIONS.get(str(found["hidden_act"]))
    if activation is None:
        obstacles.append(f"{architecture.keys['hidden_act'][0]} is {found['hidden_act']!r}, not a kind of GELU")
    elif architecture.positions_after_pad and activation != "gelu":
        obstacles.append(f"hidden_act is {found['hidden_act']!r}, but the head has 'gelu'")
    if architecture.ours == "bert" and config.get("type_vocab_size", NUM_TOKEN_TYPES) not in (1, NUM_TOKEN_TYPES):
        obstacles.append(f"type_vocab_size is {config['type_vocab_size']}, not {NUM_TOKEN_TYPES}")
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
        "type": architecture.ours,
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
    """The task of the sentence head in a model with this config.json: nsp, sop or none. Exports say it, BERT's own has nsp."""
    return str(config.get("sentence_task", "nsp" if config.get("model_type") == "bert" else "none"))


def config_json(model: ModelConfig, tokenizer: RunTokenizer, sentence_task: str) -> dict[str, Any]:
    """config.json of a model of ours with the symbols of its tokenizer. Raises ValueError as `architecture_for`."""
    architecture = architecture_for(model)
    config: dict[str, Any] = {
        "architectures": [_CLASSES[architecture.model_type][sentence_task != "none"]],
        "model_type": architecture.model_type,
        **{theirs: getattr(model, ours) for ours, (theirs, _) in architecture.keys.items()},
        **architecture.features,
        architecture.keys["hidden_act"][0]: _PUBLISHED_ACTIVATIONS[model.hidden_act],
        "vocab_size": tokenizer.vocab_size,
    }
    if architecture.ours == "gpt":
        eos = tokenizer.special_id("eos")
        return config | {"embd_pdrop": model.hidden_dropout_prob, "bos_token_id": eos, "eos_token_id": eos}
    config["pad_token_id"] = tokenizer.special_id("pad")
    if architecture.positions_after_pad:  # whose defaults for these belong to another vocabulary
        config |= {"bos_token_id": tokenizer.special_id("cls"), "eos_token_id": tokenizer.special_id("sep")}
    return config | {
        "max_position_embeddings": model.max_position_embeddings + architecture.first_position(config),
        "type_vocab_size": NUM_TOKEN_TYPES,
        "sentence_task": sentence_task,
    }


def to_huggingface(state: Mapping[str, Tensor], model: ModelConfig, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of a model of ours under the names of its `config_json`, rows of no symbol cut off.

    Same values and dtype; contiguous, and no two share memory. The head is left out: transformers ties it to the words,
    as it is here.
    """
    architecture = architecture_for(model)
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
    architecture = architecture_of(config)
    state = {_modern(name, architecture.base): tensor for name, tensor in state.items()}
    heads, refused = {*architecture.heads, "mlm_bias"}, set[str]()
    classifier = state.get(f"{architecture.heads.get('sentence_classifier')}.weight")
    if sentence_task_of(config) == "none" or (classifier is not None and len(classifier) != 2):
        refused = {"pooler", "sentence_classifier"}  # a classifier of the same name may be of any task
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
    if architecture.ours == "bert":
        types = converted["token_type_embeddings.weight"]
        converted["token_type_embeddings.weight"] = types.expand(NUM_TOKEN_TYPES, -1) if len(types) == 1 else types
    return converted, [name for name in state if name not in taken and not name.endswith(architecture.ignored)]


def _joined(parts: tuple[str, ...], state: Mapping[str, Tensor]) -> Tensor:
    """Parameters of equal shape as one, along dim 0."""
    if len(parts) == 1:
        return state[parts[0]]
    shapes = {part: tuple(state[part].shape) for part in parts}
    if len(set(shapes.values())) > 1:
        raise UserError(
            f"the weights {', '.join(f'{part} {shape}' for part, shape in shapes.items())} must have one shape"
        )
    return torch.cat([state[part] for part in parts])


def _modern(name: str, base: str) -> str:
    """A parameter's name as classes with heads have it today."""
    for old, new in _OLD_SUFFIXES.items():
        name = name.removesuffix(old) + new if name.endswith(old) else name
    return name if name.startswith((f"{base}.", "cls.", "lm_head.", "classifier.")) else f"{base}.{name}"
