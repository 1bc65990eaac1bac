"""`te.checkpoint`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..layers.recomputation import Recomputed
from ..ops.replay import nested_backward
from ..parallel.collectives import start_all_gather
from .module import ProjectionModule


def checkpoint(  # noqa: PLR0913 - Transformer Engine's parameters and torch's
    function: Callable[..., Any],
    *args: Any,
    distribute_saved_activations: bool = False,
    get_rng_state_tracker: Callable[[], Any] | None = None,
    tp_group: ProcessGroup | None = None,
    use_reentrant: bool = True,
    preserve_rng_state: bool = True,
    context_fn: Callable[[], Any] = torch_checkpoint.noop_context_fn,
    determinism_check: str = "default",
    debug: bool = False,
    get_cuda_rng_tracker: Callable[[], Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Return function(*args, **kwargs), which backward computes again from its arguments in place of keeping what it needs.

    Transformer Engine's first form, checkpoint(function, distribute_saved_activations, get_cuda_rng_tracker, tp_group, *args,
    **kwargs), is understood too, and deprecated there. A bool as second argument tells it from the other, so a function
    whose first argument is a bool takes it by name. get_cuda_rng_tracker is the old name of get_rng_state_tracker.

    The second computation repeats the first: torch's random numbers on the CPU and on the devices of args, the tracker's
    states and its fork, torch.autocast, fp8_autocast with its recipe, and the scales of every FP8 product, also where other
    forward passes came in between. Amaxes enter a history once. Afterwards all states are as they were before backward.

    args, kwargs: anything; the gradients of tensors flow, those inside of lists and dicts too. The function may return
        anything; with use_reentrant tensors and other things, in tuples, lists and dicts of any depth. Do not change tensors in
        place that it is given.
    distribute_saved_activations: keep 1/t of args[0] on each of the t ranks of tp_group, which must hold it alike, and gather
        it in backward. args[0] itself is not touched; what else keeps it, keeps it whole.
    get_rng_state_tracker: gives the tracker, with get_states() and set_states(), from which the function draws besides torch.
    use_reentrant, preserve_rng_state, context_fn, determinism_check, debug: as in torch.utils.checkpoint. Reentrant is torch's
        older way, without torch.autograd.grad. It is left for the other where it would lose gradients, which are those of
        tensors inside of lists and dicts, and all if no argument has one; and with distribute_saved_activations.
    Under torch.no_grad() it calls the function, no more.
    Raises ValueError for arguments of the wrong kind; with distribute_saved_activations for a missing tp_group, an args[0] that
    is no tensor or that the ranks cannot share equally, and modules with sequence_parallel=True in the function: their ranks
    hold different parts already; with use_reentrant for a result that holds tensors as attributes.
    """
    get_tracker = _one_name(get_rng_state_tracker, get_cuda_rng_tracker)
    sharing, args = _by_form((distribute_saved_activations, get_tracker, tp_group), args)
    torchs = _TorchOptions(use_reentrant, preserve_rng_state, context_fn, determinism_check, debug)
    return _checkpoint(function, args, kwargs, _Sharing(*sharing), torchs)


@dataclass(frozen=True)
class _Sharing:
    """Transformer Engine's options of `checkpoint`."""

    distribute_saved_activations: bool
    get_rng_state_tracker: Callable[[], Any] | None
    tp_group: ProcessGroup | None

    def __post_init__(self) -> None:
        distribute, get_tracker, group = self.distribute_saved_activations, self.get_rng_state_tracker, self.tp_group
        if not isinstance(distribute, bool):
            raise ValueError(f"distribute_saved_activations is {distribute!r}; it must be True or False")
        if get_tracker is not None and not callable(get_tracker):
            raise ValueError(
                f"get_rng_state_tracker is {get_tracker!r}; it must be None or a function that gives the tracker"
            )
        if group is not None and not isinstance(group, ProcessGroup):
            raise ValueError(f"tp_group is {group!r}; it must be None or a process group of torch.distributed")


@dataclass(frozen=True)
class _TorchOptions:
    """Those of torch.utils.checkpoint."""

    use_reentrant: bool
    preserve_rng_state: bool
    context_fn: Callable[[], Any]
    determinism_check: str
    debug: bool

    def __post_init__(self) -> None:
        if self.use_reentrant and (self.context_fn is not torch_checkpoint.noop_context_fn or self.debug):
            raise ValueError("use_reentrant=True goes without context_fn and debug; give use_reentrant=False")


def _checkpoint(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sharing: _Sharing,
    torchs: _TorchOptions,
) -> Any:
    if not callable(function):
        raise ValueError(f"function is {function!r}; it must be callable")
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    get_tracker = sharing.get_rng_state_tracker
    if torch.compiler.is_compiling():
        if sharing.distribute_saved_activations or get_tracker is not None:
            raise ValueError("torch.compile traces no tp_group and no RNG tracker of a checkpoint; call it outside")
        # The trace has a node of its own for it, with the random numbers; FP8 scales are values in the trace.
        return torch_checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)
    call = _Call(function, tuple(kwargs), get_tracker() if get_tracker and torchs.preserve_rng_state else None)
    inputs = [*args, *kwargs.values()]
    if sharing.distribute_saved_activations:
        inputs[0] = call.distribute(inputs[0] if args else None, sharing.tp_group)
    elif torchs.use_reentrant and _reentrant_keeps_gradients(inputs):
        return _reentrant(call, torchs.preserve_rng_state, inputs)
    return torch_checkpoint.checkpoint(call, *inputs, **vars(torchs) | {"use_reentrant": False})


def _one_name(get_rng_state_tracker: Any, get_cuda_rng_tracker: Any) -> Any:
    if get_rng_state_tracker is not None and get_cuda_rng_tracker is not None:
        raise ValueError("get_rng_state_tracker and get_cuda_rng_tracker are two names of one argument; give one")
    return get_cuda_rng_tracker if get_rng_state_tracker is None else get_rng_state_tracker


def _by_form(named: tuple[Any, Any, Any], args: tuple[Any, ...]) -> tuple[tuple[Any, Any, Any], tuple[Any, ...]]:
    """Return (distribute_saved_activations, tracker, group) and the function's own arguments, by whichever form was used."""
    if not args or not isinstance(args[0], bool):
        return named, args
    if len(args) < 3 or named != (False, None, None):
        raise ValueError(
            f"the second argument is {args[0]}, as in checkpoint(function, distribute_saved_activations, "
            f"get_cuda_rng_tracker, tp_group, *args), but not all three are given by position alone; do so, or give them by "
            f"name"
        )
    return (args[0], args[1], args[2]), args[3:]


def _reentrant_keeps_gradients(inputs: Sequence[Any]) -> bool:
    leaves, _ = tree_flatten(list(inputs))
    direct, all_of_them = (sum(isinstance(x, Tensor) and x.requires_grad for x in part) for part in (inputs, leaves))
    return 0 < direct == all_of_them


def _reentrant(call: Callable[..., Any], preserve_rng_state: bool, inputs: list[Any]) -> Any:
    """Return the results of torch's older way, which passes the gradients of a tuple's own tensors alone, in their form."""
    forms: list[TreeSpec] = []

    def flat(*args: Any) -> tuple[Any, ...]:
        leaves, form = tree_flatten(call(*args))
        forms[:] = [form]
        for leaf in leaves:
            inside = () if isinstance(leaf, Tensor) else getattr(leaf, "__dict__", {}).values()
            if any(isinstance(value, Tensor) for value in inside):
                raise ValueError(
                    f"the function returns a {type(leaf).__name__}, whose tensors would lose their gradients; return a tuple, "
                    f"list or dict, or give use_reentrant=False"
                )
        return tuple(leaves)

    results = _Reentrant.apply(flat, preserve_rng_state, *inputs)  # type: ignore[no-untyped-call]
    return tree_unflatten(results, forms[0])


class _Reentrant(torch_checkpoint.CheckpointFunction):
    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        with nested_backward():  # the scales of gradients change when the outermost backward pass ends
            return torch_checkpoint.CheckpointFunction.backward(ctx, *gradients)


@dataclass
class _Distributed:
    """The first argument of a call, of which this rank keeps a part. whole: until the first pass has taken it."""

    whole: Tensor | None
    shape: torch.Size
    requires_grad: bool
    group: ProcessGroup

    def take_whole(self) -> Tensor:
        whole, self.whole = self.whole, None
        assert whole is not None, "taken once"
        return whole

    def gather(self, part: Tensor) -> Tensor:
        whole = start_all_gather(part, self.group).wait().view(self.shape)
        return whole.requires_grad_(self.requires_grad)


class _Call(Recomputed):
    """The function of one checkpoint. Its last arguments are keyword arguments of these names."""

    def __init__(self, function: Callable[..., Any], names: tuple[str, ...], tracker: Any) -> None:
        super().__init__(_taking_names(function, names))
        self._tracker = tracker
        self._distributed: _Distributed | None = None
        if tracker is not None:
            if not (hasattr(tracker, "get_states") and hasattr(tracker, "set_states")):
                raise ValueError(
                    f"get_rng_state_tracker gives {tracker!r}, which has no get_states() and set_states(); give a tracker "
                    f"such as RngStatesTracker"
                )
            self._states, self._active = tracker.get_states(), getattr(tracker, "active", None)

    def distribute(self, x: Any, group: ProcessGroup | None) -> Tensor:
        """Return this rank's part of the first argument, to be kept in its place."""
        if group is None:
            raise ValueError("distribute_saved_activations=True but tp_group is None; give the ranks that share it")
        if not isinstance(x, Tensor):
            raise ValueError(
                f"distribute_saved_activations=True but args[0] is {x!r}; the first argument of the function must be the "
                f"tensor to distribute"
            )
        if x.numel() % group.size():
            raise ValueError(
                f"distribute_saved_activations=True but args[0] has {x.numel()} elements, which the {group.size()} ranks of "
                f"tp_group cannot share equally; pad it to a multiple of {group.size()}, or turn it off"
            )
        self._distributed = _Distributed(x, x.shape, x.requires_grad, group)
        return x.detach().reshape(-1).chunk(group.size())[group.rank()].clone()

    def _first(self, *args: Any) -> Any:
        if self._distributed is None:
            return super()._first(*args)
        refusal = register_module_forward_pre_hook(_refuse_sequence_parallelism)
        try:
            return super()._first(self._distributed.take_whole(), *args[1:])
        finally:
            refusal.remove()

    def _again(self, *args: Any) -> Any:
        if self._distributed is not None:
            args = self._distributed.gather(args[0]), *args[1:]
        with self._tracker_as_then():
            return super()._again(*args)

    @contextmanager
    def _tracker_as_then(self) -> Iterator[None]:
        """Give the tracker its states of the first pass. Torch has restored its own generators, also that of a fork, before."""
        if self._tracker is None:
            yield
            return
        now = self._tracker.get_states(), getattr(self._tracker, "active", None)
        self._set_tracker(self._states, self._active)
        try:
            yield
        finally:
            self._set_tracker(*now)

    def _set_tracker(self, states: Any, active: str | None) -> None:
        self._tracker.set_states(states)
        if hasattr(self._tracker, "active"):  # ours; Megatron's does not know
            self._tracker.active = active


def _taking_names(function: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    """Return the function with its last positional arguments given to these names."""

    def call(*args: Any) -> Any:
        count = len(args) - len(names)
        return function(*args[:count], **dict(zip(names, args[count:], strict=True)))

    return call if names else function


def _refuse_sequence_parallelism(module: nn.Module, _: Any) -> None:
    marked = any(getattr(parameter, "sequence_parallel", False) for parameter in module.parameters(recurse=False))
    if marked or (isinstance(module, ProjectionModule) and module.options.sequence_parallel):
        raise ValueError(
            f"distribute_saved_activations=True but {type(module).__name__} has sequence_parallel=True, under which the ranks "
            f"hold different parts already; turn one of them off"
        )
