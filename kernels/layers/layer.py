"""The transformer layer: attention and feed-forward halves around one residual stream, of the parts that parts.py chooses."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..ops.attention.attention import AttentionMask, Recompute, attention
from ..ops.autocast import autocast_dtype
from ..ops.dropout import draw_seed
from ..ops.mlp.activation import activated
from ..ops.norm.head_norm import head_norm
from ..ops.norm.residual_norm import are_invertible, residual_norm
from ..ops.parallel_linear import ParallelMode
from ..ops.region import active_region
from ..ops.replay import remembered
from ..parallel.collectives import ONE_PROCESS, TensorParallel, copy_to_group
from ..parallel.sharding import Partition, shard_parameters
from .cache import LayerCache
from .config import LayerConfig
from .inner_modules import must_be_called
from .norms import make_norm
from .parts import Parts, compose
from .products import Products
from .projection import Projection
from .token_products import TokenProducts

# The dropouts of one layer draw from one seed; the site keeps their masks apart, and those of processes where they must differ.
_ATTENTION_SITE, _ATTENTION_OUTPUT_SITE, _OUTPUT_SITE, _SITES = 1, 2, 3, 8
_PLAIN, _OF_TOKENS = Products(), TokenProducts()
_PROJECTIONS = ("qkv", "attention_output", "intermediate", "output")
_INVERTIBLE = ("attention_norm", "mlp_norm")  # the order of the answers


@dataclass(frozen=True)
class Pass:
    """What one forward pass has besides its hidden states.

    seed: None where nothing is dropped. invertible: (attention_norm, mlp_norm). token_shape: (B, S) or (T,), of all processes.
    recompute: of attention. replicated: the vectors that every process holds whole, by (module, weight or bias), of modules
    that are not called. products: how this pass multiplies. called: the modules that compute for themselves, see
    `TransformerLayer.called_modules`. cache: the keys and values of earlier tokens, in generation.
    """

    mask: AttentionMask
    seed: Tensor | None
    invertible: tuple[bool, bool]
    token_shape: torch.Size
    recompute: Recompute
    replicated: Mapping[tuple[str, str], Tensor]
    products: Products
    called: tuple[str, ...]
    cache: LayerCache | None


class TransformerLayer(nn.Module):
    """One layer of a BERT or a GPT, of 2018 or of today: `LayerConfig` says which.

    pre-LN:  r = x + drop(attn(norm(x)));  y = r + drop(mlp(norm(r)))
    post-LN: r = norm(x + drop(attn(x)));  y = norm(r + drop(mlp(r)))

    Each half owns one norm, `attention_norm` and `mlp_norm`, whichever side it stands on. The rows of `qkv` are all
    queries (N, D), then all keys, then all values, (G, D) each; of a gated `intermediate` F pass the activation, and F more
    multiply. `q_norm` and `k_norm` (D,) are there with qk_norm. Dropout follows `module.training`. A stack of pre-LN
    layers needs one more norm at its end.

    parallel: the t processes that share the layer. Each has N/t heads, G/t key heads, or one where t is a multiple of G, and
        F/t of the feed-forward width; parameters are shards, marked as parallel/sharding.py has it, with the start values of
        one process if torch is seeded alike on all. With `sequence` hidden states are this process's part of the rows of
        tokens, as a LayerStack gives them.

    Inside fp8_autocast the four projections have FP8 products. normalize_invertible and gelu_checkpoint save nothing there,
    since a projection keeps one byte per number of its input.

    Parameters of the modules inside are read by fused ops. One that does more than its parameters say, as an adapter in its
    place or one with hooks, is called instead, outside of fused ops, FP8 and memory flags; on one process.
    """

    parallel = ONE_PROCESS  # of subclasses with parameters of their own, as the next line
    _plain: Mapping[str, type[nn.Module]] = {}
    parts: Parts

    def __init__(self, config: LayerConfig, parallel: TensorParallel = ONE_PROCESS) -> None:
        super().__init__()
        size, (queries, keys, values) = config.hidden_size, config.qkv_parts
        width = config.intermediate_size
        inward_parts = (width, width) if config.gated_mlp else (width,)
        self.config = config
        self.parts = compose(config, parallel)
        if "attention_norm" in self.parts.norms:
            self.attention_norm = self._make_norm()
        self.qkv = Projection(size, queries + keys + values, config.attention_bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = (
                make_norm(config.head_size, config.layer_norm_eps, "rms_norm", False) for _ in "qk"
            )
        self.attention_output = Projection(queries, size, config.attention_bias)
        self.mlp_norm = self._make_norm()
        self.intermediate = Projection(size, sum(inward_parts), config.mlp_bias)
        self.output = Projection(width, size, config.mlp_bias)
        inward, outward = (self.qkv, self.intermediate), (self.attention_output, self.output)
        for projection in (*inward, *outward):
            projection.std = config.initializer_range if projection in inward else config.output_range
        self._plain = {name: type(module) for name, module in self.named_children()}
        self.reset_parameters()
        self.parallel = parallel
        shards = {
            "qkv": Partition(0, config.qkv_parts),
            "intermediate": Partition(0, inward_parts if config.gated_mlp else None),
        }
        partitions = {f"{name}.{kind}": shards[name] for name in shards for kind in ("weight", "bias")}
        partitions |= {"attention_output.weight": Partition(1), "output.weight": Partition(1)}
        own = dict(self.named_parameters())
        shard_parameters(self, {name: cut for name, cut in partitions.items() if name in own}, parallel.group)
        for projection in (*inward, *outward):
            projection.out_features, projection.in_features = projection.weight.shape
            projection.parallel = parallel

    def reset_parameters(self) -> None:
        """Draw weights from N(0, initializer_range), see LayerConfig.adjust_init_range; biases are 0, norms the identity.

        Raises ValueError where processes share the layer: they hold shards, and weights are drawn whole.
        """
        norms = *self.parts.norms.names, *self.parts.heads.norms
        for name in ("qkv", "intermediate", "attention_output", "output", *norms):
            getattr(self, name).reset_parameters()

    def _make_norm(self) -> nn.Module:
        config = self.config
        return make_norm(config.hidden_size, config.layer_norm_eps, config.norm, config.norm_bias)

    def forward(
        self,
        hidden_states: Tensor,
        mask: AttentionMask | None = None,
        *,
        seed: Tensor | None = None,
        invertible: tuple[bool, bool] | None = None,
        token_shape: torch.Size | None = None,
        recompute_attention: bool = False,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Return the layer's output, in shape and dtype of hidden_states.

        hidden_states: (B, S, H), or (T, H) where the mask has cu_seqlens; with parallel.sequence this process's part of their
        rows, (B * S / t, H) or (T / t, H). mask: which tokens see which, one object for all layers; None: all see all.
        seed: of this pass's dropouts, int64 of shape (), on the device; None: the layer draws one. invertible: this layer's
        answer of `invertible_norms`; None: the layer asks. Both are for stacks, which do either for all their layers at once.
        token_shape: (B, S) or (T,), of all processes; needed with parallel.sequence, and else that of hidden_states.
        recompute_attention: keep no attention probabilities, but compute scores and softmax again in backward.
        cache: of a LayerStack, which checks what goes with it.
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
        if cache is not None and products is _PLAIN and cache.takes_token_products(hidden_states, self.parallel):
            products = _OF_TOKENS
        now = Pass(mask, seed, invertible, token_shape, recompute, replicated, products, called, cache)
        return self._run(hidden_states, now)

    def called_modules(self) -> tuple[str, ...]:
        """Return the names of the modules inside that compute for themselves now: see `must_be_called`.

        Raises ValueError where processes share the layer, of whose shards and tokens these modules know nothing.
        """
        modules = self._modules
        called = tuple(name for name, plain in self._plain.items() if must_be_called(modules[name], plain))
        if called and self.parallel.size > 1:
            raise UserError(
                f"{called[0]} of this {type(self).__name__}, a {type(modules[called[0]]).__name__}, has hooks or a forward of "
                f"its own, which know nothing of the {self.parallel.size} processes that share the layer; remove them, or use "
                f"one process"
            )
        return called

    def _run(self, x: Tensor, now: Pass) -> Tensor:
        """Return the layer's output: both halves, each with what adds it to the residual stream."""
        norms, normalized = self.parts.norms, x
        if norms.before is not None:
            x, normalized = self._norm_before_attention(norms.before, x, now)
        out, read = self._attend(normalized, now)
        residual, normalized = self._join_attention(out, read if norms.before is None else x, now)
        out, read = self._feed_forward(normalized, now)
        return self._join_mlp(out, residual if norms.behind is None else read, now)

    def _norm_before_attention(self, name: str, x: Tensor, now: Pass) -> tuple[Tensor, Tensor]:
        """Return x, for the residual stream, and its norm."""
        if name in now.called:
            return x, getattr(self, name)(x)
        return now.products.norm(x, *_affine(name, now), **self._norming(name, now))

    def _feed_forward(self, x: Tensor, now: Pass) -> tuple[Tensor, Tensor]:
        """Return the feed-forward half, without the bias of `output` unless that is called, and x as `_attend` does."""
        part = self.parts.feed_forward
        if "intermediate" not in now.called and "output" not in now.called:
            out, read = now.products.mlp(x, self.intermediate, self.output, part)
            return out, x if now.called else read
        hidden = self._project("intermediate", x, "column", now)
        hidden = activated(hidden, part.activation, gated=part.gated, kernels=part.kernels)
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

    def _replicated(self, called: tuple[str, ...]) -> dict[tuple[str, str], Tensor]:
        """Return what every process holds whole, see `Pass`.

        Backward adds up, in one message, gradients that are those of a process's tokens or, of head norms, of its heads.
        """
        own = {
            place: getattr(getattr(self, place[0]), place[1])
            for place in self.parts.replicated
            if place[0] not in called
        }
        partial = [place for place in own if self.parallel.divides_tokens or place[0] in self.parts.heads.norms]
        if self.parallel.size > 1 and partial:
            whole = copy_to_group(torch.cat([own[place] for place in partial]), self.parallel.group)
            own |= zip(partial, whole.split([len(own[place]) for place in partial]), strict=True)
        return own

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
        """Return (residual + dropout(out + bias), its norm): the attention half added, and what the MLP reads."""
        name, options = self.parts.norms.between, self._joining(_ATTENTION_OUTPUT_SITE, now)
        bias = now.replicated.get(("attention_output", "bias"))
        if name in now.called:
            z = now.products.residual_add(out, bias, residual, kernels=self.config.kernels, **options)
            return z, getattr(self, name)(z)
        return now.products.residual_norm(
            out, bias, residual, *_affine(name, now), **self._norming(name, now), **options
        )

    def _join_mlp(self, out: Tensor, residual: Tensor, now: Pass) -> Tensor:
        """Return residual + dropout(out + bias), in post-LN its norm: the layer's output."""
        name, options = self.parts.norms.behind, self._joining(_OUTPUT_SITE, now)
        bias = now.replicated.get(("output", "bias"))
        if name is None or name in now.called:
            z = now.products.residual_add(out, bias, residual, kernels=self.config.kernels, **options)
            return z if name is None else getattr(self, name)(z)  # type: ignore[no-any-return]
        weight, norm_bias = _affine(name, now)
        return residual_norm(out, bias, residual, weight, norm_bias, **self._norming(name, now), **options)[1]

    def _norming(self, name: str, now: Pass) -> dict[str, Any]:
        """Return the options of an op that computes a norm."""
        invertible = now.invertible[_INVERTIBLE.index(name)]
        return {**self.parts.norms.options, "invertible": invertible, "kernels": self.config.kernels}

    def _joining(self, site: int, now: Pass) -> dict[str, Any]:
        """Return the options of an op that adds a half to the residual stream."""
        site = self._site(site, self.parallel.divides_tokens)
        return {"p": self.config.hidden_dropout_prob, "seed": now.seed, "site": site}

    def _attend(self, x: Tensor, now: Pass) -> tuple[Tensor, Tensor]:
        """Return the attention half up to its projection, without the projection's bias unless that is called, and x.

        x: for the residual stream where attention reads it, whose gradient the first product adds in backward; not where
        modules are called, whose hooks may keep gradients.
        """
        heads = self.parts.heads
        if "qkv" in now.called:
            qkv = self.qkv(x)
        elif self.parts.norms.before is not None or now.called:
            qkv = now.products.project(x, heads.projection(self.qkv), "column", self.parallel)
        else:
            qkv, x = now.products.project_and_input(x, heads.projection(self.qkv), self.parallel)
        qkv = self._norm_heads(heads.divide(qkv, now.token_shape), now)
        context = self._contexts(qkv, now)
        if self.parallel.divides_tokens:
            context = context.flatten(0, -2)
        return self._project("attention_output", context, "row", now), x

    def _norm_heads(self, qkv: Tensor, now: Pass) -> Tensor:
        """Return qkv with the norms of queries and keys; itself in a layer without them."""
        heads = self.parts.heads
        if not heads.norms:
            return qkv
        if set(heads.norms).isdisjoint(now.called):
            weights = [now.replicated[name, "weight"] for name in heads.norms]
            options = {"key_heads": heads.options["key_heads"], "kernels": self.config.kernels}
            return head_norm(qkv, *weights, eps=self.config.layer_norm_eps, **options)
        queries, keys, values = heads.split(qkv)
        return torch.cat([self.q_norm(queries), self.k_norm(keys), values], -2).view(qkv.shape)

    def _contexts(self, qkv: Tensor, now: Pass, **options: Any) -> Tensor:
        """Return the output of this process's heads, (..., N/t * D), of qkv (..., 3, N/t, D) or (..., (N + 2G)/t, D).

        options: of `attention`, in the place of the layer's own in this pass.
        """
        config, heads = self.config, self.parts.heads
        if now.cache is not None:
            context = now.cache.attend(qkv, heads, now.mask)
            if context is not None:
                return context
        return attention(
            qkv,
            now.mask,
            config.attention_probs_dropout_prob,
            now.seed,
            self._site(_ATTENTION_SITE, differs=True),
            recompute=now.recompute,
            **{"rotary": heads.position(now.mask, now.token_shape, qkv.device), **heads.options, **options},
        )


def _affine(name: str, now: Pass) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a norm that is not called."""
    return now.replicated[name, "weight"], now.replicated.get((name, "bias"))


def invertible_norms(layers: Sequence[TransformerLayer]) -> list[tuple[bool, bool]]:
    """Return for each layer whether backward may invert (attention_norm, mlp_norm), by its flag and its weights.

    The layers share one dtype, except for their norms. The host waits for a GPU once, and not at all where no flag is on or
    gradients are off.
    """
    asked = [layer for layer in layers if layer.config.normalize_invertible]
    asked = [layer for layer in asked if set(_INVERTIBLE).isdisjoint(layer.called_modules())]
    if not asked or not torch.is_grad_enabled():
        return [(False, False)] * len(layers)
    if torch.compiler.is_compiling():
        raise UserError(
            "normalize_invertible looks at the weights, which a trace of torch.compile cannot; call "
            "invertible_norms(layers) outside and pass each layer its answer as `invertible`"
        )
    places = [(layer, name) for layer in asked for name in layer.parts.norms.names]
    norms = [getattr(layer, name) for layer, name in places]
    qkv = asked[0].qkv
    of_qkv = qkv.weight if hasattr(qkv, "weight") else next(qkv.parameters())
    # in the dtype of hidden states; norms may be in fp32
    allowed = are_invertible([n.weight for n in norms], [getattr(n, "bias", None) for n in norms], of_qkv.dtype)
    if not all(allowed):
        warnings.warn(
            "normalize_invertible: a norm has a weight too small to recover its input from its output; such norms keep their "
            "input",
            stacklevel=2,
        )
    yes = {place for place, answer in zip(places, allowed, strict=True) if answer}
    return [tuple((layer, name) in yes for name in _INVERTIBLE) for layer in layers]  # type: ignore[misc]
