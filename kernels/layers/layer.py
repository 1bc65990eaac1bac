"""The transformer layer: attention and feed-forward halves around one residual stream, pre-LN or post-LN."""

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..ops.attention.attention import AttentionMask, Recompute, attention
from ..ops.autocast import autocast_dtype
from ..ops.dropout import draw_seed
from ..ops.mlp.activation import activated
from ..ops.norm.residual_norm import are_invertible, residual_add, residual_norm
from ..ops.parallel_linear import ParallelMode
from ..ops.region import active_region
from ..ops.replay import remembered
from ..parallel.collectives import ONE_PROCESS, TensorParallel, copy_to_group
from ..parallel.sharding import Partition, shard_parameters
from .config import LayerConfig
from .inner_modules import must_be_called
from .products import Products
from .projection import Projection

# The dropouts of one layer draw from one seed; the site keeps their masks apart, and those of processes where they must differ.
_ATTENTION_SITE, _ATTENTION_OUTPUT_SITE, _OUTPUT_SITE, _SITES = 1, 2, 3, 8
_PLAIN = Products()
_NORMS = ("attention_norm", "mlp_norm")
_PROJECTIONS = ("qkv", "attention_output", "intermediate", "output")
_INNER: dict[str, type[nn.Module]] = {**dict.fromkeys(_NORMS, nn.LayerNorm), **dict.fromkeys(_PROJECTIONS, Projection)}
_WHOLE = (*itertools.product(_NORMS, ("weight", "bias")), ("attention_output", "bias"), ("output", "bias"))


class _Affine(NamedTuple):
    """A LayerNorm's parameters, (H,) each."""

    weight: Tensor
    bias: Tensor


class _Replicated(NamedTuple):
    """The parameters that every process holds whole; biases (H,). None: of a module that is called."""

    attention_norm: _Affine
    mlp_norm: _Affine
    attention_output_bias: Tensor | None
    output_bias: Tensor | None


@dataclass(frozen=True)
class Pass:
    """What one forward pass has besides its hidden states.

    seed: None where nothing is dropped. invertible: (attention_norm, mlp_norm). token_shape: (B, S) or (T,), of all processes.
    recompute: of attention. products: how this pass multiplies. called: the modules that compute for themselves, see
    `TransformerLayer.called_modules`.
    """

    mask: AttentionMask
    seed: Tensor | None
    invertible: tuple[bool, bool]
    token_shape: torch.Size
    recompute: Recompute
    replicated: _Replicated
    products: Products
    called: tuple[str, ...]


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

    Inside fp8_autocast the four projections have FP8 products. normalize_invertible and gelu_checkpoint save nothing there,
    since a projection keeps one byte per number of its input.

    Parameters of the modules inside are read by fused ops. One that does more than its parameters say, as an adapter in its
    place or one with hooks, is called instead, outside of fused ops, FP8 and memory flags; on one process.
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
        inward, outward = (self.qkv, self.intermediate), (self.attention_output, self.output)
        for projection in (*inward, *outward):
            projection.std = config.initializer_range if projection in inward else config.output_range
        self.reset_parameters()
        self.parallel = parallel
        columns, fused = Partition(0), Partition(0, (size,) * 3)
        shards = {"qkv": fused, "intermediate": columns, "attention_output": Partition(1), "output": Partition(1)}
        partitions = {f"{name}.weight": partition for name, partition in shards.items()}
        partitions |= {"qkv.bias": fused, "intermediate.bias": columns}
        shard_parameters(self, partitions, parallel.group)
        for projection in (self.qkv, self.attention_output, self.intermediate, self.output):
            projection.out_features, projection.in_features = projection.weight.shape
            projection.parallel = parallel

    def reset_parameters(self) -> None:
        """Draw weights from N(0, initializer_range), see LayerConfig.adjust_init_range; biases are 0, LayerNorms the identity.

        Raises ValueError where processes share the layer: they hold shards, and weights are drawn whole.
        """
        projections = self.qkv, self.intermediate, self.attention_output, self.output
        for part in (*projections, self.attention_norm, self.mlp_norm):
            part.reset_parameters()

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
        """Return the layer's output, in shape and dtype of hidden_states.

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
        dtype = autocast_dtype(hidden_states.device)
        if dtype not in (None, hidden_states.dtype):
            raise UserError(
                f"torch.autocast would cast some products of the layer from {hidden_states.dtype} to {dtype} and none of its "
                f"other kernels; convert layer and input by .to(dtype), or use te.TransformerLayer, which follows it"
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
        called = self.called_modules()
        replicated, products = self._replicated(called), self._products(called)
        now = Pass(mask, seed, invertible, token_shape, recompute, replicated, products, called)
        return self._run(hidden_states, now)

    def called_modules(self) -> tuple[str, ...]:
        """Return the names of the modules inside that compute for themselves now: see `must_be_called`.

        Raises ValueError where processes share the layer, of whose shards and tokens these modules know nothing.
        """
        modules = self._modules
        called = tuple(name for name in _INNER if name in modules and must_be_called(modules[name], _INNER[name]))
        if called and self.parallel.size > 1:
            raise UserError(
                f"{called[0]} of this {type(self).__name__}, a {type(modules[called[0]]).__name__}, has hooks or a forward of "
                f"its own, which know nothing of the {self.parallel.size} processes that share the layer; remove them, or use "
                f"one process"
            )
        return called

    def _run(self, x: Tensor, now: Pass) -> Tensor:
        """Return the layer's output: both halves, each with what adds it to the residual stream."""
        config, norm = self.config, now.replicated.attention_norm
        normalized = x
        if config.pre_layer_norm:
            eps, invertible = config.layer_norm_eps, now.invertible[0]
            if "attention_norm" in now.called:
                normalized = self.attention_norm(x)
            else:
                x, normalized = now.products.norm(x, *norm, eps=eps, invertible=invertible, kernels=config.kernels)
        out, read = self._attend(normalized, now)
        residual, normalized = self._join_attention(out, x if config.pre_layer_norm else read, now)
        out, read = self._feed_forward(normalized, now)
        return self._join_mlp(out, residual if config.pre_layer_norm else read, now)

    def _feed_forward(self, x: Tensor, now: Pass) -> tuple[Tensor, Tensor]:
        """Return the feed-forward half, without the bias of `output` unless that is called, and x as `_attend` does."""
        if "intermediate" not in now.called and "output" not in now.called:
            out, read = now.products.mlp(x, self.intermediate, self.output, self.config, self.parallel)
            return out, x if now.called else read
        hidden = activated(self._project("intermediate", x, "column", now), self.config.hidden_act)
        return self._project("output", hidden, "row", now), x

    def _project(self, name: str, x: Tensor, mode: ParallelMode, now: Pass) -> Tensor:
        """Return x through a projection, without the bias of a row-parallel one unless that is called."""
        projection: Any = getattr(self, name)
        if name not in now.called:
            return now.products.project(x, projection, mode, self.parallel)
        y: Tensor = projection(x)
        return y

    @property
    def drops(self) -> bool:
        """Return whether a forward pass drops anything now."""
        return self.training and (self.config.hidden_dropout_prob > 0 or self.config.attention_probs_dropout_prob > 0)

    def _draw_seed(self, device: torch.device) -> Tensor:
        """Return the seed of this pass's dropouts, int64 of shape ()."""
        return draw_seed(device)

    def _site(self, site: int, differs: bool) -> int:
        """Return the site of a dropout whose masks differ between the processes or not."""
        return site + _SITES * self.parallel.rank if differs else site

    def _replicated(self, called: tuple[str, ...]) -> _Replicated:
        """Return what every process holds whole. Backward adds up its gradients over the processes' tokens, in one message."""
        vectors: Any = [None if name in called else getattr(getattr(self, name), kind) for name, kind in _WHOLE]
        if self.parallel.divides_tokens:
            vectors = copy_to_group(torch.cat(vectors), self.parallel.group).chunk(len(vectors))
        return _Replicated(_Affine(*vectors[:2]), _Affine(*vectors[2:4]), *vectors[4:])

    def _products(self, called: tuple[str, ...]) -> Products:
        """Return how this pass multiplies: with FP8 inside fp8_autocast, and in a recomputation as in the first pass."""
        if remembered(self, self._is_plain):
            return _PLAIN
        from .fp8_products import Fp8Products

        return Fp8Products(*(None if name in called else getattr(self, name) for name in ("qkv", "intermediate")))

    def _is_plain(self) -> bool:
        states = (self._modules[name]._modules.get("fp8") for name in _PROJECTIONS)  # type: ignore[union-attr]
        return active_region() is None and not any(states)  # a state knows a recomputation that torch runs

    def _join_attention(self, out: Tensor, residual: Tensor, now: Pass) -> tuple[Tensor, Tensor]:
        """Return (residual + dropout(out + bias), its LayerNorm): the attention half added, and what the MLP reads."""
        ours, pre = now.replicated, self.config.pre_layer_norm
        norm = ours.mlp_norm if pre else ours.attention_norm
        options = self._joining(_ATTENTION_OUTPUT_SITE, now)
        invertible, eps = now.invertible[1 if pre else 0], self.config.layer_norm_eps
        bias, name = ours.attention_output_bias, "mlp_norm" if pre else "attention_norm"
        if name in now.called:
            z = residual_add(out, bias, residual, **options)
            return z, getattr(self, name)(z)
        return now.products.residual_norm(out, bias, residual, *norm, eps=eps, invertible=invertible, **options)

    def _join_mlp(self, out: Tensor, residual: Tensor, now: Pass) -> Tensor:
        """Return residual + dropout(out + bias), in post-LN its LayerNorm: the layer's output."""
        ours, options = now.replicated, self._joining(_OUTPUT_SITE, now)
        if self.config.pre_layer_norm or "mlp_norm" in now.called:
            z = residual_add(out, ours.output_bias, residual, **options)
            return z if self.config.pre_layer_norm else self.mlp_norm(z)  # type: ignore[no-any-return]
        invertible, eps = now.invertible[1], self.config.layer_norm_eps
        norm = ours.mlp_norm
        return residual_norm(out, ours.output_bias, residual, *norm, eps=eps, invertible=invertible, **options)[1]

    def _joining(self, site: int, now: Pass) -> dict[str, Any]:
        """Return the options of an op that adds a half to the residual stream."""
        site = self._site(site, self.parallel.divides_tokens)
        return {"p": self.config.hidden_dropout_prob, "seed": now.seed, "site": site, "kernels": self.config.kernels}

    def _attend(self, x: Tensor, now: Pass) -> tuple[Tensor, Tensor]:
        """Return the attention half up to its projection, without the projection's bias unless that is called, and x.

        x: for the residual stream of post-LN, whose gradient the first product adds in backward; not where modules are called,
        whose hooks may keep gradients.
        """
        config = self.config
        heads = config.num_attention_heads // self.parallel.size
        width = config.hidden_size // config.num_attention_heads
        if config.pre_layer_norm or now.called:
            qkv = self._project("qkv", x, "column", now)
        else:
            qkv, x = now.products.project_and_input(x, self.qkv, self.parallel)
        context = self._contexts(qkv.reshape(*now.token_shape, 3, heads, width), now)
        if self.parallel.divides_tokens:
            context = context.flatten(0, -2)
        return self._project("attention_output", context, "row", now), x

    def _contexts(self, qkv: Tensor, now: Pass) -> Tensor:
        """Return the output of this process's heads, (..., H/t), of qkv (..., 3, N/t, D)."""
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


def invertible_norms(layers: Sequence[TransformerLayer]) -> list[tuple[bool, bool]]:
    """Return for each layer whether backward may invert (attention_norm, mlp_norm), by its flag and its weights.

    The layers share one dtype, except for their norms. The host waits for a GPU once, and not at all where no flag is on or
    gradients are off.
    """
    asked = [layer for layer in layers if layer.config.normalize_invertible]
    asked = [layer for layer in asked if set(_NORMS).isdisjoint(layer.called_modules())]
    if not asked or not torch.is_grad_enabled():
        return [(False, False)] * len(layers)
    if torch.compiler.is_compiling():
        raise UserError(
            "normalize_invertible looks at the weights, which a trace of torch.compile cannot; call "
            "invertible_norms(layers) outside and pass each layer its answer as `invertible`"
        )
    asked_norms = [layer_norm for layer in asked for layer_norm in (layer.attention_norm, layer.mlp_norm)]
    weights, biases = [n.weight for n in asked_norms], [n.bias for n in asked_norms]
    qkv = asked[0].qkv
    of_qkv = qkv.weight if hasattr(qkv, "weight") else next(qkv.parameters())
    allowed = are_invertible(weights, biases, of_qkv.dtype)  # that of hidden states; norms may be in fp32
    if not all(allowed):
        warnings.warn(
            "normalize_invertible: a LayerNorm has a weight too small to recover its input from its output; such LayerNorms "
            "keep their input",
            stacklevel=2,
        )
    answers = iter(zip(allowed[::2], allowed[1::2], strict=True))
    return [next(answers) if layer in asked else (False, False) for layer in layers]
