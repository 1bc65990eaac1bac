"""An exponential mean of the weights, kept by the optimizer beside its moments: `training.ema_decay`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..processes.topology import Topology
from .slices import slices_of

EMA = "ema"
"""The name of the mean in the optimizer's state of a parameter, so that it is saved, divided and resumed as moments are."""


def keep_mean(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Let every step of `optimizer` move the mean of each tensor that it steps: w_ema <- decay · w_ema + (1 - decay) · w.

    The mean has the tensor's shape and dtype, so under ZeRO it is a shard as the fp32 weights are. It starts as the weights
    before the first step that finds none. A step that is left out, as its gradient is not finite, moves nothing.
    """
    starts: dict[Tensor, Tensor] = {}

    # Not put into the state at once: optimizers make their moments where a state is empty.
    @torch.no_grad()
    def before(stepping: torch.optim.Optimizer, *_: Any) -> None:
        for tensor in _tensors(stepping):
            if tensor.grad is not None and EMA not in stepping.state.get(tensor, {}):
                starts[tensor] = tensor.detach().clone()

    @torch.no_grad()
    def after(stepping: torch.optim.Optimizer, *_: Any) -> None:
        for tensor, start in starts.items():
            stepping.state[tensor][EMA] = start
        starts.clear()
        weights = [tensor for tensor in _tensors(stepping) if EMA in stepping.state.get(tensor, {})]
        if weights:
            torch._foreach_lerp_([stepping.state[weight][EMA] for weight in weights], weights, 1 - decay)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def restored_mean(optimizer: torch.optim.Optimizer, *, kept: bool) -> str:
    """Drop a mean that was loaded and is not kept any more. Return what became of it, for the start-up report, after a comma.

    kept: whether this run keeps a mean. Empty if neither run does.
    """
    found = [state for state in optimizer.state.values() if EMA in state]
    if kept:
        return ", mean of the weights" if found else ", mean of the weights starting as they are"
    for state in found:
        del state[EMA]
    return ", without its mean of the weights" if found else ""


@contextmanager
def mean_in_model(engine: Any, topology: Topology) -> Iterator[None]:
    """Let the model of a `deepspeed.DeepSpeedEngine` compute with the mean inside, rounded to the model's dtype.

    Every process calls it alike. Afterwards the weights are as they were, bit for bit: a copy of those that the model reads
    waits meanwhile, at ZeRO stage 3 of this process's share. A weight that was never stepped has itself as its mean.
    """
    parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    held = [getattr(parameter, "ds_tensor", parameter) for parameter in parameters]
    copies = [tensor.detach().clone() for tensor in held]
    try:
        with _changing(engine):
            _write_means(engine, parameters, topology)
        yield
    finally:
        with _changing(engine):
            for tensor, copy in zip(held, copies, strict=True):
                tensor.copy_(copy)


def _tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


@contextmanager
def _changing(engine: Any) -> Iterator[None]:
    """Let what the model computes with be written inside.

    At ZeRO stage 3 that is every process's share, from which whole parameters are gathered; some of them are kept whole.
    """
    sharded = engine.zero_optimization_stage() == 3
    if sharded:
        engine.optimizer.checkpoint_event_prologue()
    with torch.no_grad():
        yield
    if sharded:
        engine.optimizer.checkpoint_event_epilogue()


def _write_means(engine: Any, parameters: list[Any], topology: Topology) -> None:
    stage, state = engine.zero_optimization_stage(), engine.basic_optimizer.state
    for each in slices_of(engine, {id(parameter): place for place, parameter in enumerate(parameters)}):
        mean = state.get(each.tensor, {}).get(EMA)
        if mean is None:
            continue
        flat = mean.view(-1)
        if stage == 3:
            for place, start, _, numel in each.segments:
                parameters[place].ds_tensor[:numel].copy_(flat[start : start + numel])
            continue
        own = {segment.place: segment for segment in each.segments}
        for place in each.places:
            parameter = parameters[place]
            whole = torch.zeros(parameter.numel(), dtype=mean.dtype, device=parameter.device)
            if place in own:
                _, start, offset, numel = own[place]
                whole[offset : offset + numel] = flat[start : start + numel]
            if stage > 0 and topology.num_replicas > 1:
                dist.all_reduce(whole, group=topology.data_group)
            parameter.view(-1).copy_(whole)
