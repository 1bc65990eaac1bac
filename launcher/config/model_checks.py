"""Rules of the `model` section that hold for every recipe. Torch-free.

Each yields faults, as `checks.py` has it; what only one recipe forbids is in its own folder of recipes.
"""

from collections.abc import Iterator

from ...recipes.config import Fault, ModelConfig

_TURNS_IN_PAIRS = "model.position_embedding rope turns columns of a head in pairs; choose an even size"


def model_faults(model: ModelConfig) -> Iterator[Fault]:
    """Yield every broken rule between keys of the model."""
    yield from _head_faults(model)
    yield from _position_faults(model)
    yield from _window_faults(model)
    yield from _norm_faults(model)
    if model.gated_mlp and model.hidden_act == "relu2":
        why = "no model gates the square of ReLU; set silu or a gelu, or model.gated_mlp false"
        yield Fault(("model.hidden_act", "model.gated_mlp"), f"got 'relu2', but {why}")


def _head_faults(model: ModelConfig) -> Iterator[Fault]:
    heads = model.num_attention_heads
    if model.head_dim is None and model.hidden_size % heads:
        rule = f"must be a multiple of model.num_attention_heads {heads} unless model.head_dim is given"
        yield Fault(("model.hidden_size", "model.num_attention_heads"), f"got {model.hidden_size}, {rule}")
    if heads % model.key_heads:
        rule = f"must divide model.num_attention_heads {heads}, so that each is shared by equally many"
        yield Fault(("model.num_key_value_heads", "model.num_attention_heads"), f"got {model.key_heads}, {rule}")
    if model.position_embedding == "rope" and model.head_size % 2:
        if model.head_dim is not None:
            yield Fault(("model.head_dim", "model.position_embedding"), f"got {model.head_dim}, but {_TURNS_IN_PAIRS}")
        elif model.hidden_size % heads == 0:
            keys = ("model.num_attention_heads", "model.hidden_size", "model.position_embedding")
            what = f"which with model.hidden_size {model.hidden_size} makes heads of {model.head_size} columns"
            yield Fault(keys, f"got {heads}, {what}, but {_TURNS_IN_PAIRS}")


def _position_faults(model: ModelConfig) -> Iterator[Fault]:
    if model.position_embedding == "learned":
        default = ModelConfig.model_fields["rope_theta"].default
        for name, unset in (("rope_theta", default), ("local_rope_theta", None)):
            value = getattr(model, name)
            if value != unset:
                why = "model.position_embedding learned has no angles; set rope, or remove the key"
                yield Fault((f"model.{name}", "model.position_embedding"), f"got {value}, but {why}")
    elif model.local_rope_theta is not None and model.sliding_window is None:
        why = "without model.sliding_window no layer is local; set it, or remove the key"
        yield Fault(("model.local_rope_theta", "model.sliding_window"), f"got {model.local_rope_theta}, but {why}")
    if model.position_embedding == "rope" and not model.pre_layer_norm:
        why = "no post-LN model has it; set learned, or model.pre_layer_norm true"
        yield Fault(("model.position_embedding", "model.pre_layer_norm"), f"got 'rope', but {why}")


def _window_faults(model: ModelConfig) -> Iterator[Fault]:
    window, every = model.sliding_window, model.global_attn_every_n_layers
    key = "model.global_attn_every_n_layers"
    if window is None:
        if every is not None:
            why = "without model.sliding_window all layers are global; set it, or remove the key"
            yield Fault((key, "model.sliding_window"), f"got {every}, but {why}")
        return
    if window >= model.max_position_embeddings:
        rule = f"must be less than model.max_position_embeddings {model.max_position_embeddings}, or it hides nothing"
        yield Fault(
            ("model.sliding_window", "model.max_position_embeddings"),
            f"got {window}, {rule}; set null for attention over all tokens",
        )
    if not any(map(model.is_local, range(min(2, model.num_hidden_layers)))):
        why = f"then no layer of model.num_hidden_layers {model.num_hidden_layers} is local"
        keys_read = (key, "model.num_hidden_layers", "model.sliding_window")
        yield Fault(keys_read, f"got {every}, but {why}; set another number, or model.sliding_window null")


def _norm_faults(model: ModelConfig) -> Iterator[Fault]:
    if model.norm != "rms_norm":
        return
    if model.norm_bias:
        why = "model.norm rms_norm has none; set false"
        yield Fault(("model.norm_bias", "model.norm"), f"got true, but {why}")
    if not model.pre_layer_norm:
        why = "no post-LN model has it; set layer_norm, or model.pre_layer_norm true"
        yield Fault(("model.norm", "model.pre_layer_norm"), f"got 'rms_norm', but {why}")


def shared_key_head_faults(model: ModelConfig, tensor: int) -> Iterator[Fault]:
    """Yield what keeps processes from dividing key heads, or from sharing each equally; tensor: processes of a replica."""
    keys = model.num_key_value_heads
    if keys is None or keys % tensor == 0:
        return
    names = ("parallel.tensor", "model.num_key_value_heads")
    if tensor % keys:
        yield Fault(names, f"got {tensor}, must divide model.num_key_value_heads {keys}, or be a multiple of it")
    elif keys * model.head_size % tensor:
        what = f"the {keys * model.head_size} rows of all model.num_key_value_heads {keys}, which the processes store in parts"
        yield Fault((*names, "model.head_dim"), f"got {tensor}, must divide {what}")
