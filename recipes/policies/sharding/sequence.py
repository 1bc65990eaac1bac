"""Sequence parallelism in a sharded model: between the products each process has its part of every sequence.

The first layer takes its part, dim 1 of (B, S, H), the last gives the whole back. Attention gathers the whole, because it asks
its input for its length; an MLP's products gather and scatter by themselves, because its tokens are independent.
"""

from typing import Any

from torch import Tensor, nn

from ....kernels.errors import UserError
from ....kernels.parallel.collectives import (
    Group,
    TensorParallel,
    gather_from_group,
    gather_from_sequence,
    scatter_to_group,
)
from ..catalog.lookup import shipped_models
from .plan import Plan
from .rank_random import RankRandom


def check_sequence_parallel(plan: Plan) -> None:
    """Raises ValueError if the layers of a model are not known to work on parts of a sequence."""
    reason = None
    for place in plan.places:
        if not place.policy.norms():
            reason = f"{place.policy.__name__} names no norms"
        elif len(place.holders) != 1:
            reason = f"{place.name} has cross-attention, which sees another sequence"
        elif getattr(place.config, "layerdrop", 0):
            reason = "layerdrop may leave out the layers that divide and join the sequence; set it to 0"
    if reason is not None:
        raise UserError(
            f"sequence_parallel=True: {reason}; leave it out, or use one of these models without cross-attention: "
            f"{shipped_models(lambda family: family.norms)}"
        )


def divide_sequence(model: nn.Module, plan: Plan, parallel: TensorParallel, random: RankRandom) -> None:
    """Adds the collectives to a model whose projections are sharded."""
    model.register_forward_pre_hook(_refuse_hidden_states, with_kwargs=True)
    stacks: dict[str, list[nn.Module]] = {}

    def gather_tokens(x: Tensor) -> Tensor:
        """Return (B, S, H) of everyone's (B, S/t, H)."""
        return gather_from_sequence(x.transpose(0, 1), parallel.group).transpose(0, 1).contiguous()

    for place in plan.places:
        stacks.setdefault(place.name.rpartition(".")[0], []).append(place.module)
        for holder in place.holders.values():
            holder.register_forward_pre_hook(_on_input(gather_tokens), with_kwargs=True)
        # All dropout of a layer is of this process's tokens or heads.
        place.module.register_forward_pre_hook(
            lambda layer, _: random.enter(next(layer.parameters()).device) if layer.training else None
        )
    for layers in stacks.values():
        scatter = _on_input(lambda x: scatter_to_group(x, parallel.group, dim=1))
        layers[0].register_forward_pre_hook(scatter, with_kwargs=True)
        layers[-1].register_forward_hook(lambda module, _, output: _gather_output(output, parallel.group))


def _gather_output(output: Any, group: Group) -> Any:
    if isinstance(output, tuple):
        return gather_from_group(output[0], group, dim=1), *output[1:]
    return gather_from_group(output, group, dim=1)


def _on_input(function: Any) -> Any:
    """A forward pre-hook that applies the function to the hidden states, the first argument."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (function(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": function(kwargs["hidden_states"])}

    return hook


def _refuse_hidden_states(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    asked = kwargs.get("output_hidden_states")
    if asked or (asked is None and getattr(getattr(module, "config", None), "output_hidden_states", False)):
        raise UserError(
            "output_hidden_states=True: with sequence_parallel=True a layer gives this process's tokens only; leave one out"
        )
