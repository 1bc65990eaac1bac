"""How a layer is computed: fused ops and the transformer layer made of them.

Shape letters, here and in every docstring: B batch, S sequence, H hidden, N heads, D head dim (H / N), F feed-forward width,
V vocabulary, T tokens (B * S).

The public names are imported on first access: commands that only read a run config must not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .deepspeed.config import DeepSpeedTransformerConfig
    from .deepspeed.layer import DeepSpeedTransformerLayer
    from .layers.cache import KeyValueCache
    from .layers.config import LayerConfig
    from .layers.layer import TransformerLayer
    from .layers.layer_stack import LayerStack
    from .ops.attention.attention import AttentionMask

__all__ = [
    "AttentionMask",
    "DeepSpeedTransformerConfig",
    "DeepSpeedTransformerLayer",
    "KeyValueCache",
    "LayerConfig",
    "LayerStack",
    "TransformerLayer",
]

_MODULES = {
    "AttentionMask": ".ops.attention.attention",
    "DeepSpeedTransformerConfig": ".deepspeed.config",
    "DeepSpeedTransformerLayer": ".deepspeed.layer",
    "KeyValueCache": ".layers.cache",
    "LayerConfig": ".layers.config",
    "LayerStack": ".layers.layer_stack",
    "TransformerLayer": ".layers.layer",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
