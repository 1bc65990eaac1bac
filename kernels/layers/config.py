"""What a transformer layer is built from."""

import math
from dataclasses import dataclass

from ..errors import UserError
from ..ops.choices import Activation, Kernels


@dataclass(frozen=True)
class LayerConfig:
    """Hold the geometry and flags of a `TransformerLayer`; raises ValueError for a combination that no layer can have.

    num_hidden_layers: depth of the model the layer is part of, for adjust_init_range.
    adjust_init_range: start the two projections that write to the residual stream at
        initializer_range / sqrt(2 * num_hidden_layers), so that its variance does not grow with depth (GPT-2, DeepSpeed).
    kernels: `auto` runs Triton kernels on CUDA tensors where this version has them and PyTorch elsewhere; `reference` runs
        PyTorch everywhere.
    normalize_invertible: keep the output of a LayerNorm instead of its input. The output is kept in any case, as the input
        of the next projection, so the input's (B, S, H) is saved, twice per layer. A LayerNorm with a weight so small
        that its gradient would be off by more than a percent keeps its input; a warning says so once.
    gelu_checkpoint: drop GELU's output (B, S, F), compute it again in backward.
    attn_dropout_checkpoint: drop the attention probabilities after dropout (B, N, S, S), compute them again in backward.
        Without dropout, and on the Triton path, they are never kept.
    stochastic_mode: results may differ from run to run where that is faster. It changes one thing: the Triton backward of
        attention adds the queries' gradient atomically, for sequences over 128 tokens in half precision. Off, the same
        seed gives the same bits.
    """

    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: Activation = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    pre_layer_norm: bool = True
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    num_hidden_layers: int = 1
    adjust_init_range: bool = True
    kernels: Kernels = "auto"
    normalize_invertible: bool = False
    gelu_checkpoint: bool = False
    attn_dropout_checkpoint: bool = False
    stochastic_mode: bool = False

    @property
    def output_range(self) -> float:
        """Return the standard deviation from which the two projections that write to the residual stream start."""
        return self.initializer_range / (math.sqrt(2.0 * self.num_hidden_layers) if self.adjust_init_range else 1.0)

    def __post_init__(self) -> None:
        for field in ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers"):
            if getattr(self, field) <= 0:
                raise UserError(f"{field}={getattr(self, field)} is not positive; give the layer's real size")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={self.num_attention_heads}; "
                f"choose a head count that divides it"
            )
        for field in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, field) < 1:
                raise UserError(f"{field}={getattr(self, field)} is not a dropout probability; it must be in [0, 1)")
        if self.hidden_act not in ("gelu", "gelu_tanh"):
            raise UserError(f"hidden_act={self.hidden_act!r} is unknown; use 'gelu' or 'gelu_tanh'")
