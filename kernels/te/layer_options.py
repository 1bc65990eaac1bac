"""The parameters of `te.TransformerLayer`, checked."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .core_attention import MaskType, check_mask_type
from .module import Initializer, SharedOptions, check_positive
from .normalization import Normalization

InputFormat = Literal["sbhd", "bshd", "thd"]
LayerType = Literal["encoder", "decoder"]


@dataclass(frozen=True)
class LayerOptions(SharedOptions):
    """Hold the geometry and flags of a `TransformerLayer`; raises ValueError for what no layer can have.

    hidden_size, ffn_hidden_size, num_attention_heads: H, F, N.
    layernorm_epsilon: added to the variance in every norm. (BERT has 1e-12.)
    hidden_dropout: of what each half adds to the residual stream, behind proj and behind fc2. attention_dropout: of the
        attention probabilities.
    init_method: draws the weights of QKV and fc1 in place, output_layer_init_method those of proj and fc2. None: normal of
        standard deviation 0.023, for both.
    apply_residual_connection_post_layernorm: what is added to a half's output is the output of the norm before it, not the
        norm's input. output_layernorm: no norm before QKV, one behind the layer; the feed-forward half keeps the norm before
        it. The original BERT is both True, and `layernorm_mlp.layer_norm_*` is then its attention.output.LayerNorm; one alone
        is another network.
    layer_number: from 1; by which `InferenceParams` tells layers apart, and read by nothing else.
    apply_query_key_layer_scaling, attention_softmax_in_fp32: change nothing. Softmax is always in fp32, where the first has
        lost its reason, the range of fp16; it is an identity in exact arithmetic.
    layer_type: 'encoder', or 'decoder' with a second attention half over `encoder_output`.
    kv_channels: D, columns of a head; None: H / N. num_gqa_groups: heads of keys and values, each for N / num_gqa_groups
        consecutive queries; None: N.
    self_attn_mask_type: 'causal', 'padding', 'padding_causal', 'arbitrary' or 'no_mask'; see `TransformerLayer.forward`.
        Causal unless given: a BERT needs 'padding'.
    set_parallel_mode: QKV and fc1 are column-parallel, proj and fc2 row-parallel.
    sequence_parallel, tp_group, tp_size, get_rng_state_tracker, fuse_wgrad_accumulation, params_dtype, device: see
        `SharedOptions`.
    seq_length, micro_batch_size: for Transformer Engine's JIT warm-up; nothing here needs one, so they change nothing.
    drop_path_rate: at which a half's output is dropped for a whole sample, in [0, 1]; by sample in every input format. (In
        Transformer Engine by dim 0, which holds positions, and NaN at 1.) Not for cross-attention, as there.
    fuse_qkv_params: one parameter for queries, keys and values, or three; see `MultiheadAttention`. fuse_wgrad_accumulation
        needs one.
    bias, normalization, activation, zero_centered_gamma: see `LayerNormMLP` and `LayerNorm`, for the whole layer.
    attn_input_format: 'sbhd' for (S, B, H), 'bshd' for (B, S, H), 'thd' for (T, H), packed sequences without padding.
    """

    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    layernorm_epsilon: float = 1e-5
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    init_method: Initializer | None = None
    output_layer_init_method: Initializer | None = None
    apply_residual_connection_post_layernorm: bool = False
    layer_number: int | None = None
    apply_query_key_layer_scaling: bool = True
    output_layernorm: bool = False
    attention_softmax_in_fp32: bool = False
    layer_type: LayerType = "encoder"
    kv_channels: int | None = None
    num_gqa_groups: int | None = None
    self_attn_mask_type: MaskType = "causal"
    set_parallel_mode: bool = False
    seq_length: int | None = None
    micro_batch_size: int | None = None
    drop_path_rate: float = 0.0
    fuse_qkv_params: bool = False
    bias: bool = True
    normalization: Normalization = "LayerNorm"
    zero_centered_gamma: bool = False
    activation: str = "gelu"
    attn_input_format: InputFormat = "sbhd"

    def __post_init__(self) -> None:
        for name in ("hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "num_gqa_groups"):
            if getattr(self, name) is not None:
                check_positive(**{name: getattr(self, name)})
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={self.num_attention_heads}; choose a "
                f"number of heads that divides it, or give kv_channels"
            )
        if self.num_attention_heads % self.groups:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not divisible by num_gqa_groups={self.num_gqa_groups}; "
                f"every group has equally many heads"
            )
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not a dropout probability; it must be in [0, 1)")
        if not 0 <= self.drop_path_rate <= 1:
            raise ValueError(f"drop_path_rate={self.drop_path_rate} is not a probability; it must be in [0, 1]")
        check_mask_type("self_attn_mask_type", self.self_attn_mask_type)
        for name, kinds in (("layer_type", get_args(LayerType)), ("attn_input_format", get_args(InputFormat))):
            if getattr(self, name) not in kinds:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(kinds)}")
        if self.attn_input_format != "sbhd" and self.sequence_parallel:
            raise ValueError(
                f"sequence_parallel=True divides dim 0, which holds the sequence in 'sbhd' alone; "
                f"attn_input_format is {self.attn_input_format!r}"
            )
        if self.attn_input_format == "thd" and self.layer_type == "decoder":
            raise ValueError(
                "this version has no cross-attention of packed sequences; use 'sbhd' or 'bshd' in a decoder"
            )
        if self.fuse_wgrad_accumulation and not self.fuse_qkv_params:
            raise ValueError("fuse_wgrad_accumulation=True needs fuse_qkv_params=True: one weight with one main_grad")
        super().__post_init__()

    @property
    def groups(self) -> int:
        """Return the number of heads of keys and values."""
        return self.num_attention_heads if self.num_gqa_groups is None else self.num_gqa_groups

    @property
    def head_dim(self) -> int:
        """Return the number of columns of a head."""
        return self.hidden_size // self.num_attention_heads if self.kv_channels is None else self.kv_channels

    @property
    def shared(self) -> SharedOptions:
        """Return the options that the modules inside are given as well."""
        return SharedOptions(**{entry.name: getattr(self, entry.name) for entry in dataclasses.fields(SharedOptions)})

    @property
    def norm(self) -> dict[str, Any]:
        """Return the options of every norm of the layer, by the names that the modules have for them."""
        return {
            "eps": self.layernorm_epsilon,
            "normalization": self.normalization,
            "zero_centered_gamma": self.zero_centered_gamma,
        }
