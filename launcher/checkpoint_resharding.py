"""Checkpoints of tensor-parallel runs put together, and taken apart again for another number of processes.

Each process of a replica writes the parts it holds; state.json says how the parts make up the whole.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels.sharding import (
    Partition,
    join_shards,
    join_state_dicts,
    partitions_of,
    shard_state_dict,
    take_shard,
)
from .checkpoint_files import read_file
from .topology import Topology

_WRAPPED = "optimizer_state_dict"  # where DeepSpeed's fp16 and bf16 wrappers of stage 0 keep the state of our optimizer


def partitions_record(module: torch.nn.Module) -> dict[str, Any]:
    """JSON values that `partitions_from` turns back into `partitions_of(module)`."""
    return {name: [partition.dim, partition.parts] for name, partition in partitions_of(module).items()}


def partitions_from(state: Mapping[str, Any]) -> dict[str, Partition]:
    """How each divided parameter of a checkpoint with this state.json is cut."""
    record = state.get("partitions", {})
    return {name: Partition(dim, None if parts is None else tuple(parts)) for name, (dim, parts) in record.items()}


def own_part(full: Mapping[str, Tensor], module: torch.nn.Module, topology: Topology) -> dict[str, Tensor]:
    """What this process holds of a full state dict of `module`."""
    return shard_state_dict(full, partitions_of(module), topology.tensor_rank, topology.tensor_parallel)


def model_files(checkpoint: Path, tensor_parallel: int) -> list[dict[str, Any]]:
    """Contents of the file of each process of a replica, in order of rank; of ZeRO stage 0, 1 or 2."""
    return [read_file(checkpoint / f"mp_rank_{rank:02d}_model_states.pt") for rank in range(tensor_parallel)]


def load_resharded(engine: Any, checkpoint: Path, state: Mapping[str, Any], topology: Topology) -> None:
    """Weights, optimizer state, loss scale and counters of a checkpoint of ZeRO stage 0 with another tensor-parallel size.

    state: of the checkpoint. Every process reads all files, so for a moment it holds a whole model with its moments.
    """
    partitions = partitions_from(state)
    files = model_files(checkpoint, state["engine"]["tensor_parallel"])
    full = join_state_dicts([file["module"] for file in files], partitions)
    engine.module.load_state_dict(own_part(full, engine.module, topology))
    ours = partitions_of(engine.module)

    def reshard(name: str, parts: Sequence[Tensor]) -> Tensor:
        if parts[0].dim() == 0 or not (name in partitions or name in ours):
            return parts[0]
        whole = join_shards(parts, partitions[name], name) if name in partitions else parts[0]
        if name not in ours:
            return whole
        return take_shard(whole, ours[name], topology.tensor_rank, topology.tensor_parallel, name)

    optimizer = _resharded_optimizer([file["optimizer"] for file in files], _names_by_position(engine), reshard)
    engine.optimizer.load_state_dict(optimizer)
    for counter in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, counter, files[0][counter])


def _names_by_position(engine: Any) -> list[str]:
    """Names of the parameters in the order in which the optimizer counts them."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    wrapped = getattr(
        engine.optimizer, "fp16_groups", None
    )  # the model's parameters, where the optimizer has fp32 copies
    groups = [group["params"] for group in engine.optimizer.param_groups] if wrapped is None else wrapped
    return [names[id(parameter)] for group in groups for parameter in group]


def _resharded_optimizer(
    saved: Sequence[Mapping[str, Any]], names: Sequence[str], reshard: Callable[[str, Sequence[Tensor]], Tensor]
) -> dict[str, Any]:
    """One optimizer state dict of those of all processes. reshard: this process's part of those of a named parameter."""
    if _WRAPPED in saved[0]:
        inner = _resharded_optimizer([each[_WRAPPED] for each in saved], names, reshard)
        by_name = iter(names)
        copies = [
            [reshard(next(by_name), parts) for parts in zip(*groups, strict=True)]
            for groups in zip(*(each["fp32_groups"] for each in saved), strict=True)
        ]
        return {**saved[0], _WRAPPED: inner, "fp32_groups": copies}
    states = {
        index: {key: reshard(names[index], [each["state"][index][key] for each in saved]) for key in state}
        for index, state in saved[0]["state"].items()
    }
    return {**saved[0], "state": states}
