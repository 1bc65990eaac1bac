"""The transformer layer: attention and feed-forward halves around one residual stream, pre-LN or post-LN."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .attention import AttentionMask, attention
from .dropout import draw_seed
from .linear import linear
from .mlp import Activation, mlp
from .residual_norm import are_invertible, norm, residual_add, residual_norm

# The dropouts of one layer draw from one seed; the site keeps their masks apart.
_ATTENTION_SITE, _ATTENTION_OUTPUT_SITE, _OUTPUT_SITE = 1, 2, 3


@dataclass(frozen=True)
class LayerConfig:
    """Geometry and flags of a `TransformerLayer`; raises ValueError for a combination no layer can have.

    num_hidden_layers: depth of the model the layer is part of, for adjust_init_range.
    adjust_init_range: start the two projections that write to the residual stream at
        initializer_range / sqrt(2 * num_hidden_layers), so that its variance does not grow with depth (GPT-2, DeepSpeed).
    kernels: `auto` runs Triton kernels on CUDA tensors where this version has them and PyTorch elsewhere; `reference` runs
        PyTorch everywhere.
    normalize_invertible: keep the output of a LayerNorm instead of its input. The output is kept in any case, as the input
        of the projection behind it, so the input's (B, S, H) is saved, twice per layer. A LayerNorm with a weight so small
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
    kernels: Literal["auto", "reference"] = "auto"
    normalize_invertible: bool = False
    gelu_checkpoint: bool = False
    attn_dropout_checkpoint: bool = False
    stochastic_mode: bool = False

    def __post_init__(self) -> None:
        for field in ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers"):
            if getattr(self, field) <= 0:
                raise ValueError(f"{field}={getattr(self, field)} is not positive; give the layer's real size")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={self.num_attention_heads}; "
                f"choose a head count that divides it"
            )
        for field in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} is not a dropout probability; it must be in [0, 1)")
        if self.hidden_act not in ("gelu", "gelu_tanh"):
            raise ValueError(f"hidden_act={self.hidden_act!r} is unknown; use 'gelu' or 'gelu_tanh'")


@dataclass(frozen=True)
class _Join:
    """Where a half's projection meets the residual stream, and the LayerNorm behind it."""

    projection: nn.Linear
    after: nn.LayerNorm
    site: int
    invertible: bool


class TransformerLayer(nn.Module):
    """One layer of BERT or GPT.

    pre-LN:  r = x + drop(attn(norm(x)));  y = r + drop(mlp(norm(r)))
    post-LN: r = norm(x + drop(attn(x)));  y = norm(r + drop(mlp(r)))

    Each half owns one LayerNorm, `attention_norm` and `mlp_norm`, whichever side it stands on. The rows of `qkv` are all
    queries, then all keys, then all values, each (N, D). Dropout follows `module.training`. A stack of pre-LN layers needs
    one more LayerNorm at its end.
    """

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.config = config
        size, eps = config.hidden_size, config.layer_norm_eps
        self.attention_norm = nn.LayerNorm(size, eps=eps)
        self.qkv = nn.Linear(size, 3 * size)
        self.attention_output = nn.Linear(size, size)
        self.mlp_norm = nn.LayerNorm(size, eps=eps)
        self.intermediate = nn.Linear(size, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights from N(0, initializer_range), biases 0, LayerNorms the identity; see LayerConfig.adjust_init_range."""
        config = self.config
        output_std = config.initializer_range
        if config.adjust_init_range:
            output_std /= math.sqrt(2.0 * config.num_hidden_layers)
        for inner in (self.qkv, self.intermediate):
            nn.init.normal_(inner.weight, std=config.initializer_range)
        for outer in (self.attention_output, self.output):
            nn.init.normal_(outer.weight, std=output_std)
        for projection in (self.qkv, self.attention_output, self.intermediate, self.output):
            nn.init.zeros_(projection.bias)
        for layer_norm in (self.attention_norm, self.mlp_norm):
            layer_norm.reset_parameters()

    def forward(
        self,
        hidden_states: Tensor,
        mask: AttentionMask | None = None,
        *,
        seed: Tensor | None = None,
        invertible: tuple[bool, bool] | None = None,
    ) -> Tensor:
        """The layer's output, (B, S, H) in the dtype of hidden_states, or (T, H) for a packed batch.

        hidden_states: (B, S, H), or (T, H) where the mask has cu_seqlens. mask: which tokens see which, one object for all
        layers; None: all see all.
        seed: of this pass's dropouts, int64 of shape (), on the device; None: the layer draws one. invertible: this layer's
        answer of `invertible_norms`; None: the layer asks. Both are for stacks, which do either for all their layers at once.
        Raises ValueError if the last dim is not hidden_size, and under torch.compile for normalize_invertible without
        `invertible`.
        """
        config = self.config
        mask = AttentionMask() if mask is None else mask
        (invertible,) = invertible_norms([self]) if invertible is None else (invertible,)
        if hidden_states.shape[-1] != config.hidden_size:
            raise ValueError(
                f"hidden_states has last dim {hidden_states.shape[-1]}, the layer has hidden_size={config.hidden_size}"
            )
        if not self.drops:
            seed = None
        elif seed is None:
            seed = self._draw_seed(hidden_states.device)
        if config.pre_layer_norm:
            return self._pre_layer_norm(hidden_states, mask, seed, invertible)
        return self._post_layer_norm(hidden_states, mask, seed, invertible)

    def _pre_layer_norm(
        self, hidden_states: Tensor, mask: AttentionMask, seed: Tensor | None, invertible: tuple[bool, bool]
    ) -> Tensor:
        config, first, second = self.config, self.attention_norm, self.mlp_norm
        normalized = norm(
            hidden_states,
            first.weight,
            first.bias,
            eps=first.eps,
            invertible=invertible[0],
            kernels=config.kernels,
        )
        context = self._attend(normalized, mask, seed)
        join = _Join(self.attention_output, second, _ATTENTION_OUTPUT_SITE, invertible[1])
        residual, normalized = self._join(context, hidden_states, join, seed)
        return residual_add(
            self._mlp(normalized),
            self.output.bias,
            residual,
            p=config.hidden_dropout_prob,
            seed=seed,
            site=_OUTPUT_SITE,
            kernels=config.kernels,
        )

    def _post_layer_norm(
        self, hidden_states: Tensor, mask: AttentionMask, seed: Tensor | None, invertible: tuple[bool, bool]
    ) -> Tensor:
        context = self._attend(hidden_states, mask, seed)
        join = _Join(self.attention_output, self.attention_norm, _ATTENTION_OUTPUT_SITE, invertible[0])
        _, residual = self._join(context, hidden_states, join, seed)
        join = _Join(self.output, self.mlp_norm, _OUTPUT_SITE, invertible[1])
        return self._join(self._mlp(residual), residual, join, seed)[1]

    @property
    def drops(self) -> bool:
        """Whether a forward pass drops anything now."""
        return self.training and (self.config.hidden_dropout_prob > 0 or self.config.attention_probs_dropout_prob > 0)

    def _draw_seed(self, device: torch.device) -> Tensor:
        """The seed of this pass's dropouts, int64 of shape ()."""
        return draw_seed(device)

    def _join(self, x: Tensor, residual: Tensor, join: "_Join", seed: Tensor | None) -> tuple[Tensor, Tensor]:
        """(residual + dropout(x + bias of the projection that made x), its LayerNorm)."""
        return residual_norm(
            x,
            join.projection.bias,
            residual,
            join.after.weight,
            join.after.bias,
            eps=join.after.eps,
            p=self.config.hidden_dropout_prob,
            seed=seed,
            site=join.site,
            invertible=join.invertible,
            kernels=self.config.kernels,
        )

    def _attend(self, x: Tensor, mask: AttentionMask, seed: Tensor | None) -> Tensor:
        """The attention half up to its projection, without the projection's bias."""
        config = self.config
        heads = config.num_attention_heads
        qkv = linear(x, self.qkv.weight, self.qkv.bias)
        qkv = qkv.view(*x.shape[:-1], 3, heads, config.hidden_size // heads)  # (B, S, 3, N, D)
        context = attention(
            qkv,
            mask,
            config.attention_probs_dropout_prob,
            seed,
            _ATTENTION_SITE,
            dropout_checkpoint=config.attn_dropout_checkpoint,
            stochastic=config.stochastic_mode,
            kernels=config.kernels,
        )
        return linear(context, self.attention_output.weight)

    def _mlp(self, x: Tensor) -> Tensor:
        """The feed-forward half, without the bias of its second projection."""
        config = self.config
        return mlp(
            x,
            self.intermediate.weight,
            self.intermediate.bias,
            self.output.weight,
            config.hidden_act,
            gelu_checkpoint=config.gelu_checkpoint,
            kernels=config.kernels,
        )


def invertible_norms(layers: Sequence[TransformerLayer]) -> list[tuple[bool, bool]]:
    """For each layer whether backward may invert (attention_norm, mlp_norm): its flag is on and the weights allow it.

    The layers share one dtype. The host waits for a GPU once, not at all where no flag is on or gradients are off.
    """
    asked = [layer for layer in layers if layer.config.normalize_invertible]
    if not asked or not torch.is_grad_enabled():
        return [(False, False)] * len(layers)
    if torch.compiler.is_compiling():
        raise ValueError(
            "normalize_invertible looks at the weights, which a trace of torch.compile cannot; call "
            "invertible_norms(layers) outside and pass each layer its answer as `invertible`"
        )
    asked_norms = [layer_norm for layer in asked for layer_norm in (layer.attention_norm, layer.mlp_norm)]
    weights, biases = [n.weight for n in asked_norms], [n.bias for n in asked_norms]
    allowed = are_invertible(weights, biases, weights[0].dtype)
    if not all(allowed):
        warnings.warn(
            "normalize_invertible: a LayerNorm has a weight too small to recover its input from its output; such LayerNorms "
            "keep their input",
            stacklevel=2,
        )
    answers = iter(zip(allowed[::2], allowed[1::2], strict=True))
    return [next(answers) if layer.config.normalize_invertible else (False, False) for layer in layers]
