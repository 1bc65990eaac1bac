"""Rotary positions and windows of attention as config.json says them: in the words of transformers 5, and in those before."""

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig

LOCAL, GLOBAL = "sliding_attention", "full_attention"


def rope_theta(
    config: Mapping[str, Any], obstacles: list[str], key: str = "rope_theta", default: float = 10000.0, kind: str = ""
) -> Any:
    """Return the base of the angles, unchecked, and add to the obstacles what turns queries and keys in another way.

    key: of config.json before transformers 5. kind: of the layers, where each kind has a base of its own.
    """
    given = config.get("rope_parameters") or {}
    if kind and isinstance(given, Mapping):
        given = given.get(kind) or {}
    theta = None
    for name, source in (("rope_parameters", given), ("rope_scaling", config.get("rope_scaling") or {})):
        if not isinstance(source, Mapping):
            obstacles.append(f"{name} is {source!r}, not an object")
            continue
        rope_type = source.get("rope_type", source.get("type", "default"))
        if rope_type != "default":
            obstacles.append(f"{name} has rope_type {rope_type!r}, not 'default'")
        share = source.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        if share not in (None, 1):
            obstacles.append(f"partial_rotary_factor is {share!r}, not 1.0")
        theta = source.get("rope_theta") if theta is None else theta
    return config.get(key, default) if theta is None else theta


def rope_parameters(theta: float) -> dict[str, Any]:
    """Return what config.json says of plain rotary positions."""
    return {"rope_type": "default", "rope_theta": theta}


def window_keys(kinds: Any, depth: Any, window: Any, obstacles: list[str]) -> dict[str, Any]:
    """Return `sliding_window` and `global_attn_every_n_layers` of `depth` layers of these kinds.

    window: of local ones. What is no list of kinds, and a pattern that these keys do not say, are added to the obstacles.
    """
    if not isinstance(kinds, list) or len(kinds) != depth or not {LOCAL, GLOBAL}.issuperset(map(str, kinds)):
        obstacles.append(f"layer_types must name {LOCAL} or {GLOBAL} for each of {depth} layers")
        return {}
    numbers = [number for number, kind in enumerate(kinds) if kind == GLOBAL]
    if len(numbers) == depth:
        return {}
    if not numbers:
        return {"sliding_window": window}
    every = numbers[1] if len(numbers) > 1 else depth
    if numbers != list(range(0, depth, every)):
        obstacles.append(f"layers {', '.join(map(str, numbers[:9]))} are global, not every n-th from the first on")
    return {"sliding_window": window, "global_attn_every_n_layers": every}


def layer_types(model: ModelConfig) -> list[str]:
    """Return the kind of each layer."""
    return [LOCAL if model.is_local(layer) else GLOBAL for layer in range(model.num_hidden_layers)]
