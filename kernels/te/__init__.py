"""Transformer Engine's modules by their names, computed by the kernels of this project; docs/te.md has a guide.

    from xformer_train.kernels import te

in place of `import transformer_engine.pytorch as te`. They work on a CPU too.
"""

from ..fp8.linear import DelayedScaling, Float8CurrentScaling, Format, fp8_autocast
from .checkpoint import checkpoint
from .inference import InferenceParams
from .linear import LayerNormLinear, Linear
from .mlp import LayerNormMLP
from .normalization import LayerNorm, RMSNorm
from .rotary import RotaryPositionEmbedding
from .transformer_layer import TransformerLayer

__all__ = [
    "DelayedScaling",
    "Float8CurrentScaling",
    "Format",
    "InferenceParams",
    "LayerNorm",
    "LayerNormLinear",
    "LayerNormMLP",
    "Linear",
    "RMSNorm",
    "RotaryPositionEmbedding",
    "TransformerLayer",
    "checkpoint",
    "fp8_autocast",
]
