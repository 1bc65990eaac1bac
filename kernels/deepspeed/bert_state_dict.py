"""A BERT layer's state dict under Hugging Face's names and under DeepSpeed's, each from the other."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..layers.bert_names import BERT_LAYER

_PREFIXES = {
    "attn_qkv": "qkv",
    "attn_o": "attention_output",
    "attn_n": "attention_norm",
    "inter_": "intermediate",
    "output_": "output",
    "norm_": "mlp_norm",
}
# Each of DeepSpeed's parameters, and what Hugging Face's post-LN BertLayer calls the parts it is made of along dim 0.
_BERT_NAMES = {
    f"{prefix}{kind[0]}": tuple(f"{part}.{kind}" for part in BERT_LAYER[ours])
    for prefix, ours in _PREFIXES.items()
    for kind in ("weight", "bias")
}


def to_bert_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` with the parameters of every post-LN DeepSpeed layer in it under Hugging Face BERT's names, same values.

    state: of one layer or of a whole model; names in front of a layer's parameters (`bert.encoder.layer.0.`) stay, and
    so does everything that belongs to no layer. Only for post-LN layers (pre_layer_norm=False), which a state dict does
    not tell: BERT has no place for the LayerNorms of a pre-LN layer. Raises ValueError if there is no layer in `state`, or
    not all of one.
    """
    taken: set[str] = set()
    converted: dict[str, Tensor] = {}
    for prefix in _layer_prefixes(state, "attn_qkvw"):
        for name, parts in _BERT_NAMES.items():
            value = _entry(state, prefix + name)
            # Copies, because safetensors refuses parts of one storage and torch.save would write it whole for each.
            values = [value] if len(parts) == 1 else [part.clone() for part in value.chunk(len(parts))]
            converted.update({prefix + part: v for part, v in zip(parts, values, strict=True)})
            taken.add(prefix + name)
    return {name: value for name, value in state.items() if name not in taken} | converted


def from_bert_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` with the parameters of every Hugging Face BertLayer in it under DeepSpeed's names; undoes the other way.

    state: of one layer or of a whole model, for post-LN layers; see `to_bert_state_dict`. Raises ValueError alike.
    """
    taken: set[str] = set()
    converted: dict[str, Tensor] = {}
    for prefix in _layer_prefixes(state, _BERT_NAMES["attn_qkvw"][0]):
        for name, parts in _BERT_NAMES.items():
            values = [_entry(state, prefix + part) for part in parts]
            converted[prefix + name] = values[0] if len(values) == 1 else torch.cat(values)
            taken.update(prefix + part for part in parts)
    return {name: value for name, value in state.items() if name not in taken} | converted


def _layer_prefixes(state: Mapping[str, Tensor], first: str) -> list[str]:
    prefixes = [name.removesuffix(first) for name in state if name == first or name.endswith("." + first)]
    if not prefixes:
        raise ValueError(
            f"the state dict has no entry {first} and so no layer; give the state dict of a layer or model"
        )
    return prefixes


def _entry(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise ValueError(f"the state dict has no entry {name}, though others of the same layer; give all of the layer")
    return state[name]
