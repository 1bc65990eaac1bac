"""Which part of a parameter a tensor-parallel process holds: its marks, its initialization, and state dicts at other sizes.

The full layout, a parameter as one process would hold it, does not depend on the group: checkpoints of any tensor-parallel
size are made from it and turned into it. A fused parameter, the queries, keys and values in one matrix, is cut part by part,
so that every process holds its heads of each.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .collectives import Group, group_rank, group_size

_KEPT = "_kept_marks"  # the attribute of a module that holds its _Marks


@dataclass(frozen=True)
class Partition:
    """How a full tensor is cut: along `dim`; parts: sizes of the fused parts along it, in order, None for one part.

    rows: of the full tensor that are no padding, None for all.
    """

    dim: int
    parts: tuple[int, ...] | None = None
    rows: int | None = None


class _Marks(dict[str, Partition]):
    """The partitions of a module's own parameters, by name. A copy of the module marks its parameters by them."""

    def __init__(self, parameters: dict[str, nn.Parameter | None]) -> None:
        super().__init__()
        self.parameters = parameters

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Marks":
        copied = _Marks(copy.deepcopy(self.parameters, memo))  # those of the module's copy, or about to be
        copied.update(self)
        copied.renew()
        return copied

    def renew(self) -> None:
        for name, partition in self.items():
            parameter = self.parameters.get(name)
            if parameter is not None:
                mark_sharded(parameter, partition)


def mark_sharded(parameter: Tensor, partition: Partition) -> None:
    """Says on the parameter that it is a shard, by Megatron's names.

    DeepSpeed's gradient norm reads `tensor_model_parallel`: it counts marked parameters on every process of a tensor-parallel
    group and others on the first alone. `partition_parts` and `partition_rows` are ours. A copy of the parameter has no marks
    unless `keep_marks` was called.
    """
    marks = {
        "tensor_model_parallel": True,
        "partition_dim": partition.dim,
        "partition_stride": 1,
        "partition_parts": partition.parts,
        "partition_rows": partition.rows,
    }
    for name, value in marks.items():
        setattr(parameter, name, value)


def is_sharded(parameter: Tensor) -> bool:
    """Whether `mark_sharded` marked the parameter."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


def keep_marks(module: nn.Module) -> None:
    """Writes the marks of the module's parameters on the modules that own them, where copies of the module keep them.

    So do pickles, and `load_state_dict(assign=True)`, which replaces parameters; the new ones are marked.
    """
    for inner in module.modules():
        for name, parameter in inner._parameters.items():
            if parameter is None or not is_sharded(parameter):
                continue
            if _KEPT not in vars(inner):
                vars(inner)[_KEPT] = _Marks(inner._parameters)
                inner.register_load_state_dict_post_hook(_renew)
            vars(inner)[_KEPT][name] = partition_on(parameter)


def partitions_of(module: nn.Module) -> dict[str, Partition]:
    """The partition of every parameter of the module that is a shard, by the names of its state dict.

    Raises ValueError where a module has a kept mark for a parameter that it has no more, as behind a parametrization.
    """
    found = {}
    for path, inner in module.named_modules(remove_duplicate=False):
        prefix, kept = f"{path}." if path else "", vars(inner).get(_KEPT, {})
        own = {name: parameter for name, parameter in inner._parameters.items() if parameter is not None}
        for name in kept.keys() - own.keys():
            raise UserError(
                f"{prefix}{name} is marked as a shard, and the module has no such parameter any more; remove what took its "
                f"place, as pruning and parametrizations do"
            )
        marked = {name: partition_on(parameter) for name, parameter in own.items() if is_sharded(parameter)}
        found.update({prefix + name: partition for name, partition in (marked | kept).items()})
    return found


def partition_on(parameter: Any) -> Partition:
    """The partition that `mark_sharded` wrote on the parameter."""
    return Partition(parameter.partition_dim, parameter.partition_parts, parameter.partition_rows)


def _renew(module: nn.Module, _: Any) -> None:
    vars(module)[_KEPT].renew()


@torch.no_grad()
def shard_parameters(module: nn.Module, partitions: Mapping[str, Partition], group: Group) -> None:
    """Cuts parameters of the module that are still whole to this process's shards, and marks them, by name.

    For modules that draw their weights whole: seed torch's default generator alike on all processes, and the weights do not
    depend on the group's size. Each cut parameter is a new nn.Parameter. Raises ValueError as `take_shard` does.
    """
    for name, partition in partitions.items():
        owner, _, own_name = name.rpartition(".")
        parameter = module.get_parameter(name)
        if group_size(group) > 1:
            shard = take_shard(parameter, partition, group_rank(group), group_size(group), name)
            parameter = nn.Parameter(shard, parameter.requires_grad)
            setattr(module.get_submodule(owner), own_name, parameter)
        mark_sharded(parameter, partition)
    keep_marks(module)


@torch.no_grad()
def initialize_sharded(
    parameter: nn.Parameter,
    init_method: Callable[[Tensor], object],
    full_shape: Sequence[int],
    partition_dim: int,
    group: Group,
    parts: Sequence[int] | None = None,
) -> None:
    """Fills this process's shard with its part of a full fp32 tensor that init_method fills, and marks the parameter.

    partition_dim, parts: see `Partition`.

    The full tensor is drawn on the parameter's device from torch's default generator, which must be in the same state on
    every process of the group and is afterwards. So the values do not depend on the group's size, and an init_method that
    looks at the shape sees the full one. Raises ValueError if the shape of the parameter is not that of the shard.
    """
    partition = Partition(partition_dim, None if parts is None else tuple(parts))
    full = torch.empty(*full_shape, dtype=torch.float32, device=parameter.device)
    init_method(full)
    shard = take_shard(full, partition, group_rank(group), group_size(group))
    if shard.shape != parameter.shape:
        raise ValueError(
            f"parameter is {tuple(parameter.shape)}, the shard of {tuple(full_shape)} along dim {partition_dim} over "
            f"{group_size(group)} processes is {tuple(shard.shape)}; allocate the parameter with that shape"
        )
    parameter.copy_(shard)
    mark_sharded(parameter, partition)


def take_shard(full: Tensor, partition: Partition, rank: int, size: int, name: str = "the tensor") -> Tensor:
    """What process `rank` of `size` holds of a full tensor: a contiguous copy; name: for messages.

    Raises ValueError if the parts do not add up to the partitioned dim, or `size` does not divide each.
    """
    length = full.shape[partition.dim]
    parts = (length,) if partition.parts is None else partition.parts
    if sum(parts) != length:
        raise ValueError(
            f"{name} has {length} rows along dim {partition.dim}, its parts {parts} add up to {sum(parts)}"
        )
    for part in parts:
        if part % size:
            raise UserError(
                f"{name} has {part} rows along dim {partition.dim}, which {size} processes cannot share equally; use a "
                f"tensor-parallel size that divides {part}"
            )
    pieces = [part.chunk(size, partition.dim)[rank] for part in full.split(parts, partition.dim)]
    return torch.cat(pieces, partition.dim)


def join_shards(shards: Sequence[Tensor], partition: Partition, name: str = "the tensor") -> Tensor:
    """The full tensor of its shards, in the order of ranks; name: for messages.

    Raises ValueError if a shard has not the shape that the partition gives it.
    """
    size = len(shards)
    length = shards[0].shape[partition.dim]
    parts = (length * size,) if partition.parts is None else partition.parts
    if sum(parts) != length * size or any(part % size for part in parts) or len({s.shape for s in shards}) > 1:
        raise ValueError(
            f"{name} has shards of {[tuple(shard.shape) for shard in shards]}, which are not {size} equal shares of parts "
            f"{parts} along dim {partition.dim}; give the shards of one tensor-parallel group, in order of rank"
        )
    by_rank = [shard.split([part // size for part in parts], partition.dim) for shard in shards]
    return torch.cat([piece for part in zip(*by_rank, strict=True) for piece in part], partition.dim)


def shard_state_dict(
    full: Mapping[str, Tensor], partitions: Mapping[str, Partition], rank: int, size: int
) -> dict[str, Tensor]:
    """The state dict of process `rank` of `size`: sharded entries as `take_shard` makes them, others the given tensors."""
    return {
        name: take_shard(tensor, partitions[name], rank, size, name) if name in partitions else tensor
        for name, tensor in full.items()
    }


def join_state_dicts(shards: Sequence[Mapping[str, Tensor]], partitions: Mapping[str, Partition]) -> dict[str, Tensor]:
    """The full state dict of those of all processes, in the order of ranks; entries without a partition are the first's.

    Raises ValueError if the processes hold different entries, shards that do not fit together, or entries without a
    partition that are not equal, where a NaN equals nothing.
    """
    differing = {name for shard in shards for name in shard.keys() ^ shards[0].keys()}
    if differing:
        raise ValueError(f"the state dicts of a group differ in {sorted(differing)}; give those of one checkpoint")
    return {
        name: join_shards([shard[name] for shard in shards], partitions[name], name)
        if name in partitions
        else _replicated([shard[name] for shard in shards], name)
        for name in shards[0]
    }


def _replicated(copies: Sequence[Tensor], name: str) -> Tensor:
    """The first of equal tensors."""
    first = copies[0]
    for rank, other in enumerate(copies):
        if other.shape != first.shape or other.dtype != first.dtype:
            found = [f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in (other, first)]
            difference = f"is {found[0]} on process {rank} and {found[1]} on process 0"
        elif not torch.equal(other, first):
            difference = f"has other values on process {rank} than on process 0"
        else:
            continue
        raise ValueError(
            f"{name} has no partition and {difference}; mark its parameter with mark_sharded if the processes hold shards of "
            f"it, or give the state dicts of one checkpoint"
        )
    return first
