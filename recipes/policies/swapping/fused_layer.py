"""A layer of transformers that computes with our fused layer: its class, call, hooks and state dict are as before."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....kernels.errors import UserError
from ....kernels.layers.config import LayerConfig
from ....kernels.layers.layer import Pass, TransformerLayer
from ....kernels.ops.attention.attention import AttentionMask
from ....kernels.ops.autocast import autocast_dtype
from ....kernels.parallel.collectives import TensorParallel
from ....kernels.parallel.sharding import Partition, is_sharded, mark_sharded, partitions_of
from ..sharding.rank_random import RankRandom
from .masks import LayerMasks

CACHE_NAMES = ("cache", "past_key_values")
"""What transformers calls a cache of keys and values, in arguments and outputs: since 5.24, and before."""

# Arguments of stock layers that have no influence on what they compute, or that the masks know of, as of positions.
_WITHOUT_INFLUENCE = {
    "position_ids",
    "cache_position",
    "use_cache",
    "encoder_attention_mask",
    "output_hidden_states",
    "return_dict",
    "num_items_in_batch",
}


@dataclass(frozen=True)
class Origin:
    """The tensors of a stock layer that one parameter of the fused layer is made of.

    names: of all, in the order in which they are joined along dim 0. transposed: whether matrices are stored (in, out).
    heads: this process's, of a projection to queries, keys and values that is fused head by head; None: one after the other.
    shares: how the rows are divided among several; none: equally.
    """

    names: tuple[str, ...]
    transposed: bool = False
    heads: int | None = None
    shares: tuple[int, ...] = ()

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """The parameter, contiguous; the tensor itself where nothing is to be done."""
        parts = [tensor.t() if self.transposed and tensor.dim() == 2 else tensor for tensor in tensors]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.heads is not None:
            whole = whole.unflatten(0, (self.heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        return whole.contiguous()

    def split(self, whole: Tensor) -> list[Tensor]:
        """The tensors again, as views where that is possible."""
        if self.heads is not None:
            whole = whole.unflatten(0, (3, self.heads, -1)).transpose(0, 1).flatten(0, 2)
        shares = self.shares or (1,) * len(self.names)
        rows = [len(whole) // sum(shares) * share for share in shares]
        parts = whole.split(rows) if len(rows) > 1 else [whole]
        return [part.t() if self.transposed and part.dim() == 2 else part for part in parts]


@dataclass(frozen=True, eq=False)
class GivenMask(AttentionMask):
    """What a stock layer of rotary positions or with a cache was given in a pass, in the place of a mask.

    positions: cosines and sines (B or 1, S, D) that turn queries and keys. cache: to which the pass adds its keys and values,
    whose keys and values its tokens then see. convert(like), over_cache(q, length): what `LayerMasks` makes of the mask.
    """

    positions: tuple[Tensor, Tensor] | None = None
    cache: Any = None
    layer_idx: int = 0
    convert: Callable[[Tensor], tuple[AttentionMask, int | None]] = lambda _: (AttentionMask(), None)
    over_cache: Callable[[Tensor, int], Tensor | None] = lambda *_: None


class FusedTransformerLayer(TransformerLayer):
    """A `TransformerLayer` with the positions, windows and cache that transformers hands to its layers.

    drops_attention_output: whether there is dropout behind the output projection of attention, too.
    """

    def __init__(self, config: LayerConfig, drops_attention_output: bool, parallel: TensorParallel) -> None:
        super().__init__(config, parallel)
        self.drops_attention_output = drops_attention_output

    def _join_attention(self, out: Tensor, residual: Tensor, now: Pass) -> tuple[Tensor, Tensor]:
        seed = now.seed if self.drops_attention_output else None
        return super()._join_attention(out, residual, dataclasses.replace(now, seed=seed))

    def _contexts(self, qkv: Tensor, now: Pass, **options: Any) -> Tensor:
        given = now.mask
        if not isinstance(given, GivenMask):
            return super()._contexts(qkv, now, **options)
        split, turned = self.parts.heads.split, functools.partial(_turned, positions=given.positions)
        rotary = _table(given.positions)
        if given.cache is not None:
            q, k, v = split(qkv)
            k, v = given.cache.update(turned(k).transpose(1, 2), v.transpose(1, 2), given.layer_idx)
            if k.shape[2] > qkv.shape[1]:
                return self._over_cache(turned(q).transpose(1, 2), k, v, given)
        if given.positions is not None and rotary is None:
            q, k, v = split(qkv)
            qkv = torch.cat([turned(q), turned(k), v], -2).view(qkv.shape)
        mask, window = given.convert(qkv)
        return super()._contexts(qkv, dataclasses.replace(now, mask=mask), rotary=rotary, window=window)

    def _over_cache(self, q: Tensor, k: Tensor, v: Tensor, given: GivenMask) -> Tensor:
        bias = given.over_cache(q, k.shape[2])
        p, random = self.config.attention_probs_dropout_prob if self.training else 0.0, RankRandom(self.parallel)
        if p > 0:
            random.enter(q.device)
        try:
            shared = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=p, enable_gqa=shared)
            return out.transpose(1, 2).flatten(2)
        finally:
            random.leave()


def _table(positions: tuple[Tensor, Tensor] | None) -> Tensor | None:
    """Return the `rotary` of `attention` of positions that all rows have alike, and else None."""
    if positions is None or len(positions[0]) > 1:
        return None
    return torch.cat([one[0, :, : one.shape[-1] // 2] for one in positions], -1).float()


def _turned(x: Tensor, positions: tuple[Tensor, Tensor] | None) -> Tensor:
    """Return queries or keys (B, S, heads, D), turned by the positions of each row; themselves without positions."""
    if positions is None:
        return x
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (one[:, :, None, : one.shape[-1] // 2].to(wide) for one in positions)
    first, second = x.to(wide).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


@dataclass(frozen=True)
class Swapped:
    """What a fused layer keeps of the stock layer.

    children: its modules, without parameters. names: of its parameters, in the order of its state dict. origins: by the names
    of the fused layer's parameters. partitions: of those of its parameters that are shards, by name. layer_idx: under which it
    stands in a cache of keys and values. rotary: whether it is given `position_embeddings`. window: how far a token sees.
    """

    children: dict[str, nn.Module]
    names: list[str]
    origins: Mapping[str, Origin]
    partitions: Mapping[str, Partition]
    masks: LayerMasks
    layer_idx: int | None
    rotary: bool
    window: int | None


class FusedLayer(nn.Module):
    """What comes before the class of a stock layer in the class of a fused one; see `fused_class`."""

    arguments: tuple[str, ...]
    """Of the stock layer's forward."""
    fused: FusedTransformerLayer
    swapped: Swapped

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The stock layer's output, of its arguments.

        Raises ValueError for an argument with an influence that the fused layer does not have.
        """
        given = dict(zip(self.arguments, args, strict=False)) | kwargs
        hidden_states: Tensor = given.pop(self.arguments[0])
        mask, cache = given.pop("attention_mask", None), self._pop_cache(given)
        positions = self._pop_positions(given)
        for name, value in given.items():
            if value is not None and value is not False and name not in _WITHOUT_INFLUENCE:
                raise UserError(
                    f"{name} was given to a fused {type(self).__name__}, which cannot honour it; leave it out, or call "
                    f"revert(model) first"
                )
        dtype = autocast_dtype(hidden_states.device)
        if dtype is None:
            return self.fused(hidden_states, self._mask(mask, cache, positions, hidden_states, given))  # type: ignore[no-any-return]
        x = hidden_states.to(dtype)
        with torch.autocast(x.device.type, enabled=False):  # it does not look into autograd Functions
            weights = {name: parameter.to(dtype) for name, parameter in self.fused.named_parameters()}
            y = torch.func.functional_call(self.fused, weights, (x, self._mask(mask, cache, positions, x, given)))
        return y.to(hidden_states.dtype)  # type: ignore[no-any-return]

    def _mask(
        self, given: Tensor | None, cache: Any, positions: Any, x: Tensor, arguments: Mapping[str, Any]
    ) -> AttentionMask:
        swapped = self.swapped
        masks, window, position_ids = swapped.masks, swapped.window, arguments.get("position_ids")
        if cache is None and positions is None:
            return masks.convert(given, x, position_ids)[0]
        return GivenMask(
            positions=positions,
            cache=cache,
            layer_idx=swapped.layer_idx or 0,
            convert=lambda like: masks.convert(given, like, position_ids, window),
            over_cache=lambda q, length: masks.over_cache(given, q, length, window),
        )

    def _pop_positions(self, given: dict[str, Any]) -> Any:
        """Takes what turns queries and keys out of the arguments; without rotary positions it stays and is refused."""
        if not self.swapped.rotary:
            return None
        if given.get("position_embeddings") is None:
            raise UserError(
                f"a fused {type(self).__name__} turns queries and keys, and needs position_embeddings for it"
            )
        return given.pop("position_embeddings")

    def _pop_cache(self, given: dict[str, Any]) -> Any:
        """Takes the cache out of the arguments, under whichever name; a second one stays there and is refused."""
        name = next((name for name in CACHE_NAMES if given.get(name) is not None), None)
        if name is None:
            return None
        cache = given.pop(name)
        if self.swapped.layer_idx is None or hasattr(cache, "cross_attention_cache"):
            raise UserError(
                f"{name} is a {type(cache).__name__}, which a fused {type(self).__name__} cannot use; leave it out, or call "
                f"revert(model) first"
            )
        return cache

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Under the stock layer's names and in its shapes; where shapes allow it, views of the parameters.

        A module of the fused layer that is adapted, pruned or parametrized now has its own names, below `fused`.
        """
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        pieces: dict[str, Tensor] = {}
        for ours, origin in self.swapped.origins.items():
            whole = state.pop(f"{prefix}fused.{ours}", None)
            if whole is not None:
                pieces |= dict(zip(origin.names, origin.split(whole), strict=True))
        state.update({prefix + name: pieces[name] for name in self.swapped.names if name in pieces})
        return state

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Takes the stock layer's names."""
        _, _, missing_keys, _, errors = args
        parameters = dict(self.fused.named_parameters())
        for ours, origin in self.swapped.origins.items():
            if ours not in parameters:
                continue  # its state dict has no stock names either
            pieces = origin.split(parameters[ours].detach())
            for index, name in enumerate(origin.names):
                key = prefix + name
                if key not in state_dict:
                    missing_keys.append(key)
                    continue
                value = state_dict.pop(key)
                if value.shape != pieces[index].shape:
                    errors.append(f"{key} is {tuple(value.shape)}, the model has {tuple(pieces[index].shape)}")
                    continue
                pieces[index] = value.to(pieces[index].device)
            state_dict[f"{prefix}fused.{ours}"] = origin.join(pieces)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new, (type(self).__mro__[2],), self.__dict__  # the class itself has no place in a module


class MovedModule:
    """Stands where a stock layer had a module that is fused now, for whoever looks for its weights there."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # of protocols, as copy's
            raise AttributeError(name)
        raise UserError(
            f"there is no {self._path}.{name}: swap(model) made one fused layer of the modules; revert(model) brings them "
            f"back, which shard(model, group) too needs: shard a model first, then swap it"
        )


@functools.cache
def fused_class(stock: Any) -> Any:
    """The class of fused layers in that class's place, under its name: what looks for layers by class or name finds them."""
    arguments = tuple(inspect.signature(stock.forward).parameters)[1:]
    return type(stock.__name__, (FusedLayer, stock), {"arguments": arguments, "__module__": stock.__module__})


def _new(stock: Any) -> Any:
    cls = fused_class(stock)
    return cls.__new__(cls)


def build_fused(
    config: LayerConfig,
    drops_attention_output: bool,
    origins: Mapping[str, Origin],
    parallel: TensorParallel,
    stock: Mapping[str, Tensor],
) -> FusedTransformerLayer:
    """A fused layer with the stock layer's parameters, which it takes over where they are alike; gradients and marks too.

    stock: parameters by their names, shards if processes share the layer.
    """
    with torch.device("meta"):
        fused = FusedTransformerLayer(config, drops_attention_output, parallel)
    partitions = partitions_of(fused)
    for ours, origin in origins.items():
        parameters = [stock[name] for name in origin.names]
        parameter = _converted(parameters, origin.join)
        if getattr(parameter, "sequence_parallel", False):
            # a hook sums its gradient over the processes, which the fused layer does by itself
            parameter = _converted(parameters, lambda tensors: tensors[0].detach())
        if is_sharded(parameters[0]):
            mark_sharded(parameter, partitions[ours])
        set_parameter(fused, ours, parameter)
    return fused


def stock_parameters(fused: FusedTransformerLayer, swapped: Swapped) -> dict[str, nn.Parameter]:
    """The stock layer's parameters by their names, made of the fused layer's; gradients and marks too."""
    found = {}
    for ours, origin in swapped.origins.items():
        parameter = fused.get_parameter(ours)
        for index, name in enumerate(origin.names):
            alone = len(origin.names) == 1
            found[name] = _converted(
                [parameter],
                lambda tensors, origin=origin, index=index, alone=alone: _own(origin.split(tensors[0])[index], alone),
            )
    for name, partition in swapped.partitions.items():
        mark_sharded(found[name], partition)
    return found


def stock_partitions(model: nn.Module) -> dict[str, Partition]:
    """`partitions_of` a model that may be swapped: by the names of its state dict, which are the stock model's."""
    partitions = partitions_of(model)
    for layer_name, layer in model.named_modules():
        if isinstance(layer, FusedLayer):
            prefix = f"{layer_name}." if layer_name else ""
            partitions |= {prefix + name: partition for name, partition in layer.swapped.partitions.items()}
    return partitions


def set_parameter(module: nn.Module, path: str, parameter: nn.Parameter | None) -> None:
    """Puts a parameter, or None, in the place of the one at the dotted path."""
    owner, _, name = path.rpartition(".")
    module.get_submodule(owner)._parameters[name] = parameter


def _own(piece: Tensor, alone: bool) -> Tensor:
    """Contiguous, and in memory of its own where the parameter had several pieces."""
    return piece.contiguous() if alone else piece.clone(memory_format=torch.contiguous_format)


@torch.no_grad()
def _converted(parameters: Sequence[Tensor], convert: Any) -> nn.Parameter:
    whole = convert(parameters)
    if isinstance(whole, nn.Parameter):
        return whole
    parameter = nn.Parameter(whole, parameters[0].requires_grad)
    gradients = [one.grad for one in parameters if one.grad is not None]
    if len(gradients) == len(parameters):
        parameter.grad = convert(gradients)
    return parameter
