"""What a transformer layer is built from."""

import math
from dataclasses import dataclass
from typing import get_args

from ..errors import UserError
from ..ops.choices import Activation, Kernels, Norm


@dataclass(frozen=True)
class LayerConfig:
    """Hold the geometry and flags of a `TransformerLayer`; raises ValueError for a combination that no layer can have.

    The defaults are the layer of BERT and GPT-2. Fields of today's layers:
    norm, norm_bias: the kind of both norms, and whether they add a bias, which `rms_norm` never does (arXiv 1910.07467).
    attention_bias, mlp_bias: whether qkv and attention_output, intermediate and output add a bias.
    gated_mlp: F more rows of `intermediate`, behind those that pass hidden_act, multiply its output: GeGLU with `gelu`, SwiGLU
        with `silu` (arXiv 2002.05202).
    num_key_value_heads: G heads of keys and of values, each for N / G query heads (arXiv 2305.13245); None: one for each.
    head_dim: D, columns of a head; None: H / N. qk_norm: an RMSNorm over D for queries and one for keys, before rope.
    rope_theta: turn queries and keys by their positions, with this base of wavelengths (arXiv 2104.09864); None: do not.
    attention_window: a query sees keys that are at most so many tokens away, with causal and the mask; None: all keys.
    norm_before_attention: False leaves out a pre-LN layer's `attention_norm`, where the embedding has its own in front.

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
    norm: Norm = "layer_norm"
    norm_bias: bool = True
    attention_bias: bool = True
    mlp_bias: bool = True
    gated_mlp: bool = False
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    qk_norm: bool = False
    rope_theta: float | None = None
    attention_window: int | None = None
    norm_before_attention: bool = True

    @property
    def head_size(self) -> int:
        """Return D, the columns of a head."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def key_heads(self) -> int:
        """Return G, the heads of keys and of values."""
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def qkv_parts(self) -> tuple[int, int, int]:
        """Return the rows of `qkv` that make queries, keys and values: N * D, G * D, G * D."""
        keys = self.key_heads * self.head_size
        return self.num_attention_heads * self.head_size, keys, keys

    @property
    def output_range(self) -> float:
        """Return the standard deviation from which the two projections that write to the residual stream start."""
        return self.initializer_range / (math.sqrt(2.0 * self.num_hidden_layers) if self.adjust_init_range else 1.0)

    def __post_init__(self) -> None:
        sizes = "hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers"
        for field in (*sizes, "num_key_value_heads", "head_dim", "rope_theta", "attention_window"):
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise UserError(f"{field}={value} is not positive; give the layer's real size")
        for field in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, field) < 1:
                raise UserError(f"{field}={getattr(self, field)} is not a dropout probability; it must be in [0, 1)")
        for field, choices in (("hidden_act", get_args(Activation)), ("norm", get_args(Norm))):
            if getattr(self, field) not in choices:
                raise UserError(f"{field}={getattr(self, field)!r} is unknown; use one of {', '.join(choices)}")
        self._check_heads()
        if self.norm == "rms_norm" and self.norm_bias:
            raise UserError("norm_bias=True with norm='rms_norm', which never adds a bias; set norm_bias to False")
        if not (self.pre_layer_norm or self.norm_before_attention):
            raise UserError(
                "norm_before_attention=False is for pre-LN layers, and a post-LN layer has no norm there; set it to True"
            )

    def _check_heads(self) -> None:
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={self.num_attention_heads}; "
                f"choose a head count that divides it, or give head_dim"
            )
        if self.num_attention_heads % self.key_heads:
            raise UserError(
                f"num_key_value_heads={self.key_heads} does not divide num_attention_heads={self.num_attention_heads}, "
                f"which share key heads equally; choose a number that does"
            )
        if self.rope_theta is not None and self.head_size % 2:
            named = "head_dim" if self.head_dim is not None else "hidden_size / num_attention_heads"
            raise UserError(
                f"{named}={self.head_size} is odd, but rope_theta={self.rope_theta} turns pairs of columns of a head; choose "
                f"an even size"
            )
