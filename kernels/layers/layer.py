"""The transformer layer: attention and feed-forward halves around one residual stream, pre-LN or post-LN."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..fp8.linear import Fp8State
from ..fp8.norm import norm_before, residual_norm_before
from ..ops.attention.attention import AttentionMask, Recompute, attention
from ..ops.choices import Activation, Kernels
from ..ops.dropout import draw_seed
from ..ops.mlp.mlp import mlp
from ..ops.norm.residual_norm import are_invertible, residual_add
from ..parallel.collectives import ONE_PROCESS, TensorParallel, copy_to_group
from ..parallel.sharding import Partition, shard_parameters
from .projection import ParallelMode, Projection, project, project_mlp, runs_fp8

# The dropouts of one layer draw from one seed; the site keeps their masks apart, and those of processes where they must differ.
_ATTENTION_SITE, ATTENTION_OUTPUT_SITE, _OUTPUT_SITE, _SITES = 1, 2, 3, 8


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
    kernels: Kernels = "auto"
    normalize_invertible: bool = False
    gelu_checkpoint: bool = False
    attn_dropout_checkpoint: bool = False
    stochastic_mode: bool = False

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


class _Affine(NamedTuple):
    """A LayerNorm's parameters, (H,) each."""

    weight: Tensor
    bias: Tensor


class _Replicated(NamedTuple):
    """The parameters that every process holds whole; biases (H,)."""

    attention_norm: _Affine
    mlp_norm: _Affine
    attention_output_bias: Tensor
    output_bias: Tensor


@dataclass(frozen=True)
class Pass:
    """What one forward pass has besides its hidden states.

    seed: None where nothing is dropped. invertible: (attention_norm, mlp_norm). token_shape: (B, S) or (T,), of all processes.
    recompute: of attention.
    """

    mask: AttentionMask
    seed: Tensor | None
    invertible: tuple[bool, bool]
    token_shape: torch.Size
    recompute: Recompute
    replicated: _Replicated


@dataclass(frozen=True)
class Join:
    """Where a half meets the residual stream: bias of the projection that ends it, and the LayerNorm behind."""

    bias: Tensor
    after: _Affine
    site: int
    invertible: bool


class TransformerLayer(nn.Module):
    """One layer of BERT or GPT.

    pre-LN:  r = x + drop(attn(norm(x)));  y = r + drop(mlp(norm(r)))
    post-LN: r = norm(x + drop(attn(x)));  y = norm(r + drop(mlp(r)))

    Each half owns one LayerNorm, `attention_norm` and `mlp_norm`, whichever side it stands on. The rows of `qkv` are all
    queries, then all keys, then all values, each (N, D). Dropout follows `module.training`. A stack of pre-LN layers needs
    one more LayerNorm at its end.

    parallel: the t processes that share the layer. Each has N/t heads and F/t of the feed-forward width; parameters are shards,
        marked as parallel/sharding.py has it, with the start values of one process if torch is seeded alike on all. With
        `sequence` hidden states are this process's part of the rows of tokens, as a LayerStack gives them.

    Inside an fp8_autocast region the four projections have FP8 products. normalize_invertible and gelu_checkpoint save nothing
    there: what a projection keeps of its input is one byte per number.
    """

    parallel = ONE_PROCESS  # of subclasses with parameters of their own

    def __init__(self, config: LayerConfig, parallel: TensorParallel = ONE_PROCESS) -> None:
        super().__init__()
        for field in ("num_attention_heads", "intermediate_size"):
            if getattr(config, field) % parallel.size:
                raise UserError(
                    f"{field}={getattr(config, field)} is not divisible by the {parallel.size} processes that share the layer; "
                    f"choose a tensor-parallel size that divides it"
                )
        size, eps = config.hidden_size, config.layer_norm_eps
        self.config = config
        self.attention_norm = nn.LayerNorm(size, eps=eps)
        self.qkv = Projection(size, 3 * size)
        self.attention_output = Projection(size, size)
        self.mlp_norm = nn.LayerNorm(size, eps=eps)
        self.intermediate = Projection(size, config.intermediate_size)
        self.output = Projection(config.intermediate_size, size)
        self.reset_parameters()
        self.parallel = parallel
        columns, fused = Partition(0), Partition(0, (size,) * 3)
        shards = {"qkv": fused, "intermediate": columns, "attention_output": Partition(1), "output": Partition(1)}
        partitions = {f"{name}.weight": partition for name, partition in shards.items()}
        partitions |= {"qkv.bias": fused, "intermediate.bias": columns}
        shard_parameters(self, partitions, parallel.group)
        for projection in (self.qkv, self.attention_output, self.intermediate, self.output):
            projection.out_features, projection.in_features = projection.weight.shape

    def reset_parameters(self) -> None:
        """Weights from N(0, initializer_range), biases 0, LayerNorms the identity; see LayerConfig.adjust_init_range.

        Raises ValueError where processes share the layer: they hold shards, and weights are drawn whole.
        """
        if self.parallel.size > 1:
            raise ValueError(
                f"{self.parallel.size} processes share the layer, whose weights cannot be drawn again; build a new layer"
            )
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
        token_shape: torch.Size | None = None,
        recompute_attention: bool = False,
    ) -> Tensor:
        """The layer's output, in shape and dtype of hidden_states.

        hidden_states: (B, S, H), or (T, H) where the mask has cu_seqlens; with parallel.sequence this process's part of their
        rows, (B * S / t, H) or (T / t, H). mask: which tokens see which, one object for all layers; None: all see all.
        seed: of this pass's dropouts, int64 of shape (), on the device; None: the layer draws one. invertible: this layer's
        answer of `invertible_norms`; None: the layer asks. Both are for stacks, which do either for all their layers at once.
        token_shape: (B, S) or (T,), of all processes; needed with parallel.sequence, and else that of hidden_states.
        recompute_attention: keep no attention probabilities, but compute scores and softmax again in backward.
        Raises ValueError if the last dim is not hidden_size, under torch.autocast to another dtype, and under torch.compile
        for normalize_invertible without `invertible`.
        """
        config = self.config
        mask = AttentionMask() if mask is None else mask
        (invertible,) = invertible_norms([self]) if invertible is None else (invertible,)
        if hidden_states.shape[-1] != config.hidden_size:
            raise ValueError(
                f"hidden_states has last dim {hidden_states.shape[-1]}, the layer has hidden_size={config.hidden_size}"
            )
        device = hidden_states.device.type
        autocasts = device != "meta" and torch.is_autocast_enabled(device)  # which knows no meta device
        if autocasts and torch.get_autocast_dtype(device) != hidden_states.dtype:
            raise UserError(
                f"torch.autocast would cast some products of the layer from {hidden_states.dtype} to "
                f"{torch.get_autocast_dtype(device)} and none of its other kernels; convert layer and input by .to(dtype), or "
                f"use te.TransformerLayer, which follows torch.autocast"
            )
        if not self.drops:
            seed = None
        elif seed is None:
            seed = self._draw_seed(hidden_states.device)
        if token_shape is None:
            token_shape = hidden_states.shape[:-1]
        recompute: Recompute = "dropout" if config.attn_dropout_checkpoint else "nothing"
        if recompute_attention:
            recompute = "core"
        now = Pass(mask, seed, invertible, token_shape, recompute, self._replicated())
        if config.pre_layer_norm:
            return self._pre_layer_norm(hidden_states, now)
        return self._post_layer_norm(hidden_states, now)

    def _pre_layer_norm(self, hidden_states: Tensor, now: Pass) -> Tensor:
        config, ours = self.config, now.replicated
        normalized, amax = norm_before(
            _fp8_state(self.qkv),
            hidden_states,
            *ours.attention_norm,
            eps=config.layer_norm_eps,
            invertible=now.invertible[0],
            kernels=config.kernels,
        )
        context = self._attend(normalized, amax, now)
        join = Join(ours.attention_output_bias, ours.mlp_norm, ATTENTION_OUTPUT_SITE, now.invertible[1])
        residual, normalized, amax = self._join(context, hidden_states, join, now, _fp8_state(self.intermediate))
        return residual_add(
            self._mlp(normalized, amax),
            ours.output_bias,
            residual,
            p=config.hidden_dropout_prob,
            seed=now.seed,
            site=self._site(_OUTPUT_SITE, self.parallel.divides_tokens),
            kernels=config.kernels,
        )

    def _post_layer_norm(self, hidden_states: Tensor, now: Pass) -> Tensor:
        ours = now.replicated
        context = self._attend(hidden_states, None, now)
        join = Join(ours.attention_output_bias, ours.attention_norm, ATTENTION_OUTPUT_SITE, now.invertible[0])
        _, residual, amax = self._join(context, hidden_states, join, now, _fp8_state(self.intermediate))
        join = Join(ours.output_bias, ours.mlp_norm, _OUTPUT_SITE, now.invertible[1])
        return self._join(self._mlp(residual, amax), residual, join, now, None)[1]

    @property
    def drops(self) -> bool:
        """Whether a forward pass drops anything now."""
        return self.training and (self.config.hidden_dropout_prob > 0 or self.config.attention_probs_dropout_prob > 0)

    def _draw_seed(self, device: torch.device) -> Tensor:
        """The seed of this pass's dropouts, int64 of shape ()."""
        return draw_seed(device)

    def _site(self, site: int, differs: bool) -> int:
        """The site of a dropout whose masks differ between the processes or not."""
        return site + _SITES * self.parallel.rank if differs else site

    def _replicated(self) -> _Replicated:
        """What every process holds whole, so that backward adds up the gradients of the processes' tokens, in one message."""
        first, second = self.attention_norm, self.mlp_norm
        vectors: tuple[Tensor, ...]
        vectors = (first.weight, first.bias, second.weight, second.bias, self.attention_output.bias, self.output.bias)
        if self.parallel.divides_tokens:
            vectors = copy_to_group(torch.cat(vectors), self.parallel.group).chunk(len(vectors))
        return _Replicated(_Affine(*vectors[:2]), _Affine(*vectors[2:4]), *vectors[4:])

    def _join(
        self, x: Tensor, residual: Tensor, join: Join, now: Pass, behind: Fp8State | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(residual + dropout(x + bias), its LayerNorm, the amax of that if the product of `behind` makes use of it)."""
        return residual_norm_before(
            behind,
            x,
            join.bias,
            residual,
            *join.after,
            eps=self.config.layer_norm_eps,
            p=self.config.hidden_dropout_prob,
            seed=now.seed,
            site=self._site(join.site, self.parallel.divides_tokens),
            invertible=join.invertible,
            kernels=self.config.kernels,
        )

    def _project(self, x: Tensor, projection: Any, mode: ParallelMode, amax: Tensor | None = None) -> Tensor:
        """x through a projection; the bias of a row-parallel one is left to `residual_norm` and `residual_add`."""
        bias = projection.bias if mode == "column" else None
        return project(x, projection.weight, bias, _fp8_state(projection), mode, self.parallel, amax=amax)

    def _attend(self, x: Tensor, amax: Tensor | None, now: Pass) -> Tensor:
        """The attention half up to its projection, without the projection's bias. amax: of x, if it is known."""
        config = self.config
        heads = config.num_attention_heads // self.parallel.size
        width = config.hidden_size // config.num_attention_heads
        qkv = self._project(x, self.qkv, "column", amax)
        context = self._contexts(qkv.view(*now.token_shape, 3, heads, width), now)
        if self.parallel.divides_tokens:
            context = context.flatten(0, -2)
        return self._project(context, self.attention_output, "row")

    def _contexts(self, qkv: Tensor, now: Pass) -> Tensor:
        """What the heads of this process attend to, (..., H/t) of qkv (..., 3, N/t, D)."""
        config = self.config
        return attention(
            qkv,
            now.mask,
            config.attention_probs_dropout_prob,
            now.seed,
            self._site(_ATTENTION_SITE, differs=True),
            recompute=now.recompute,
            stochastic=config.stochastic_mode,
            kernels=config.kernels,
        )

    def _mlp(self, x: Tensor, amax: Tensor | None) -> Tensor:
        """The feed-forward half, without the bias of its second projection. amax: of x, if it is known."""
        config = self.config
        parameters = self.intermediate.weight, self.intermediate.bias, self.output.weight
        first, second = _fp8_state(self.intermediate), _fp8_state(self.output)
        if first is not None and second is not None and runs_fp8(first, x.device):
            return project_mlp(x, *parameters, config.hidden_act, (first, second), self.parallel, amax=amax)
        return mlp(
            x,
            *parameters,
            config.hidden_act,
            gelu_checkpoint=config.gelu_checkpoint,
            kernels=config.kernels,
            parallel=self.parallel,
        )


def _fp8_state(projection: Any) -> Fp8State | None:
    """None for those of DeepSpeed's layer, whose API knows no FP8."""
    return getattr(projection, "fp8", None)


def invertible_norms(layers: Sequence[TransformerLayer]) -> list[tuple[bool, bool]]:
    """For each layer whether backward may invert (attention_norm, mlp_norm): its flag is on and the weights allow it.

    The layers share one dtype, but for their norms. The host waits for a GPU once, not at all where no flag is on or gradients
    are off.
    """
    asked = [layer for layer in layers if layer.config.normalize_invertible]
    if not asked or not torch.is_grad_enabled():
        return [(False, False)] * len(layers)
    if torch.compiler.is_compiling():
        raise UserError(
            "normalize_invertible looks at the weights, which a trace of torch.compile cannot; call "
            "invertible_norms(layers) outside and pass each layer its answer as `invertible`"
        )
    asked_norms = [layer_norm for layer in asked for layer_norm in (layer.attention_norm, layer.mlp_norm)]
    weights, biases = [n.weight for n in asked_norms], [n.bias for n in asked_norms]
    allowed = are_invertible(weights, biases, asked[0].qkv.weight.dtype)  # of hidden states; norms may be in fp32
    if not all(allowed):
        warnings.warn(
            "normalize_invertible: a LayerNorm has a weight too small to recover its input from its output; such LayerNorms "
            "keep their input",
            stacklevel=2,
        )
    answers = iter(zip(allowed[::2], allowed[1::2], strict=True))
    return [next(answers) if layer.config.normalize_invertible else (False, False) for layer in layers]
