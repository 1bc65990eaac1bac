"""How a layer is computed: fused ops and the transformer layer made of them.

Shape letters, here and in every docstring: B batch, S sequence, H hidden, N heads, D head dim (H / N), F feed-forward width,
V vocabulary, T tokens (B * S).
"""

from .deepspeed.config import DeepSpeedTransformerConfig
from .deepspeed.layer import DeepSpeedTransformerLayer
from .layers.layer import LayerConfig, TransformerLayer
from .layers.layer_stack import LayerStack
from .ops.attention.attention import AttentionMask

__all__ = [
    "AttentionMask",
    "DeepSpeedTransformerConfig",
    "DeepSpeedTransformerLayer",
    "LayerConfig",
    "LayerStack",
    "TransformerLayer",
]
