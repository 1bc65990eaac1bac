"""Hugging Face models over several processes: policies, and the functions that apply them.

A policy says where a model keeps the projections of its transformer layers. transformers is imported by the calls that need it,
and the public names on first access.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .catalog.layer import Description, Layer
    from .catalog.lookup import policies_for
    from .catalog.policy import Policy
    from .sharding.modules import AllReduceConv1D, AllReduceLinear, AllReduceQuantLinear
    from .sharding.parallelize import parallelize
    from .sharding.shard import shard
    from .state import full_state_dict
    from .swapping.swap import revert, swap

__all__ = [
    "AllReduceConv1D",
    "AllReduceLinear",
    "AllReduceQuantLinear",
    "Description",
    "Layer",
    "Policy",
    "full_state_dict",
    "parallelize",
    "policies_for",
    "revert",
    "shard",
    "swap",
]

_MODULES = {
    "AllReduceConv1D": ".sharding.modules",
    "AllReduceLinear": ".sharding.modules",
    "AllReduceQuantLinear": ".sharding.modules",
    "Description": ".catalog.layer",
    "Layer": ".catalog.layer",
    "Policy": ".catalog.policy",
    "full_state_dict": ".state",
    "parallelize": ".sharding.parallelize",
    "policies_for": ".catalog.lookup",
    "revert": ".swapping.swap",
    "shard": ".sharding.shard",
    "swap": ".swapping.swap",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
