"""The parts that a layer is made of: where its norms stand, how its heads attend, its feed-forward half.

They are chosen once, when a layer is built. What a kind of layer adds is a part of another kind, or another value in one of
them; the layer runs its parts in one order and asks for no kind.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from ..ops.attention.attention import AttentionMask
from ..ops.attention.rotary import rotary_table
from ..ops.mlp.mlp import MlpOptions
from ..parallel.collectives import TensorParallel
from .config import LayerConfig
from .shared_heads import gather_heads

Position = Callable[[AttentionMask, torch.Size, torch.device], Tensor | None]
"""What queries and keys are turned by: the `rotary` of `attention` in a pass with this mask, (B, S) or (T,), and device."""


class Norms(NamedTuple):
    """The names of the norms in front of attention, between the halves and behind the layer, None where none stands.

    options: what every norm op of the layer is asked for, its kind and eps.
    Where no norm stands in front of attention, the residual stream is what attention reads.
    """

    before: str | None
    between: str
    behind: str | None
    options: dict[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of those that there are, in the order of the layer's state dict."""
        return tuple(name for name in ("attention_norm", "mlp_norm") if name in self)


@dataclass(frozen=True)
class Heads:
    """The attention heads of one process, of which `qkv` makes queries, keys and values, and how they attend.

    queries, keys: N/t and G/t, or 1 where several processes read one key head. norms: the names of those of queries and keys,
    or none. projection: what a product reads of the layer's `qkv`. options: of `attention`.
    """

    queries: int
    keys: int
    size: int
    norms: tuple[str, ...]
    projection: Callable[[Any], Any]
    position: Position
    options: dict[str, Any]

    def divide(self, qkv: Tensor, token_shape: torch.Size) -> Tensor:
        """Return the product of `qkv` head by head, as `attention` takes it; token_shape: (B, S) or (T,)."""
        heads = (3, self.queries) if self.queries == self.keys else (self.queries + 2 * self.keys,)
        return qkv.reshape(*token_shape, *heads, self.size)

    def split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """Return queries (..., N/t, D), keys and values (..., G/t, D) of what `divide` gives."""
        heads = qkv.flatten(-3, -2) if self.queries == self.keys else qkv
        return heads.split([self.queries, self.keys, self.keys], -2)


class Parts(NamedTuple):
    """What a layer is composed of.

    feed_forward: the arguments of `mlp` beside tensors. replicated: which vectors every process holds whole, as (module,
    weight or bias).
    """

    norms: Norms
    heads: Heads
    feed_forward: MlpOptions
    replicated: tuple[tuple[str, str], ...]


def compose(config: LayerConfig, parallel: TensorParallel) -> Parts:
    """Return the parts of a layer that processes share; raises ValueError where they cannot share heads or width equally."""
    for field in ("num_attention_heads", "intermediate_size"):
        if getattr(config, field) % parallel.size:
            raise UserError(
                f"{field}={getattr(config, field)} is not divisible by the {parallel.size} processes that share the layer; "
                f"choose a tensor-parallel size that divides it"
            )
    norms, heads = _norms(config), _heads(config, parallel)
    feed_forward = MlpOptions(config.hidden_act, config.gated_mlp, config.gelu_checkpoint, config.kernels, parallel)
    replicated = [
        (name, kind) for name in norms.names for kind in ("weight", "bias") if kind == "weight" or config.norm_bias
    ]
    biases = {"attention_output": config.attention_bias, "output": config.mlp_bias}
    replicated += [(name, "bias") for name, has_bias in biases.items() if has_bias]
    replicated += [(name, "weight") for name in heads.norms]
    return Parts(norms, heads, feed_forward, tuple(replicated))


def _norms(config: LayerConfig) -> Norms:
    options = {"eps": config.layer_norm_eps, "kind": config.norm}
    if not config.pre_layer_norm:
        return Norms(None, "attention_norm", "mlp_norm", options)
    return Norms("attention_norm" if config.norm_before_attention else None, "mlp_norm", None, options)


def _heads(config: LayerConfig, parallel: TensorParallel) -> Heads:
    queries, keys, size = config.num_attention_heads // parallel.size, config.key_heads, config.head_size
    projection: Callable[[Any], Any] = itself
    if keys % parallel.size == 0:
        keys //= parallel.size
    elif parallel.size % keys == 0 and keys * size % parallel.size == 0:
        projection = functools.partial(gather_heads, queries=queries, keys=keys, size=size, parallel=parallel)
        keys = 1
    else:
        raise UserError(
            f"num_key_value_heads={keys} heads of {size} columns cannot be divided over the {parallel.size} processes that "
            f"share the layer, nor shared by equal numbers of them; choose a tensor-parallel size that divides "
            f"num_key_value_heads, or a multiple of it that divides {keys * size}"
        )
    position = no_position if config.rope_theta is None else Rotary(config.rope_theta, size)
    options = {
        "key_heads": None if queries == keys else keys,
        "window": config.attention_window,
        "stochastic": config.stochastic_mode,
        "kernels": config.kernels,
    }
    norms = ("q_norm", "k_norm") if config.qk_norm else ()
    return Heads(queries, keys, size, norms, projection, position, options)


def itself(qkv: Any) -> Any:
    """Return the projection to queries, keys and values, whose rows are all of this process's heads."""
    return qkv


def no_position(*_: Any) -> None:
    """Turn nothing: positions stand in the embedding, or nowhere."""


@dataclass(frozen=True)
class Rotary:
    """Turn by angles that grow with the position; one table for all layers of a pass with the same theta and head size."""

    theta: float
    head_size: int

    def __call__(self, mask: AttentionMask, token_shape: torch.Size, device: torch.device) -> Tensor | None:
        length = token_shape[-1] if mask.max_length is None else mask.max_length
        key = ("rotary", length, self.head_size, self.theta, device)
        return mask._once(key, lambda: rotary_table(length, self.head_size, self.theta, device))
