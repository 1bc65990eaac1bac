"""Where the parameters lie in the tensors that the optimizer steps: themselves, copies, or ZeRO's flat shards of many."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from ..processes.topology import Topology


class Segment(NamedTuple):
    """A part of one parameter in a tensor of the optimizer, both flattened. place: the parameter's number, see `slices_of`.

    Its numel elements begin at `start` in the tensor and at `offset` in the parameter.
    """

    place: int
    start: int
    offset: int
    numel: int


class Slice(NamedTuple):
    """A tensor that the optimizer steps on this process, and the segments of parameters in it.

    places: the parameters of which this process or another one has a segment. The tensors of ZeRO are flat. Elements in no
    segment are padding, and may be uninitialised.
    """

    tensor: Tensor
    segments: list[Segment]
    places: list[int]


@runtime_checkable
class SteppedInSlices(Protocol):
    """An optimizer that must know which parameters it steps, in place of which ZeRO gives it flat shards."""

    def divide(self, slices: Sequence[Slice], topology: Topology, *, replicated: bool) -> None:
        """Take `slices` for the parameters of every step from now on.

        Their places count the parameters given at first, in the order of the groups. topology: the processes of the run.
        replicated: whether each replica of the model holds all of them, at ZeRO stage 0, and not a shard of its own.
        """


def slices_of(engine: Any, places: Mapping[int, int]) -> list[Slice]:
    """Return what the optimizer of a `deepspeed.DeepSpeedEngine` steps on this process, in the order of its state dict.

    places: by id() of a parameter of the model, a number of the caller's for it.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        copies = getattr(optimizer, "fp32_groups", None)  # of wrappers for fp16 and bf16
        own = [group["params"] for group in optimizer.param_groups]
        parameters, stepped = (own, own) if copies is None else (optimizer.fp16_groups, copies)
        pairs = [
            pair
            for group, tensors in zip(parameters, stepped, strict=True)
            for pair in zip(group, tensors, strict=True)
        ]
        return [_slice(tensor, [(parameter, 0, 0, tensor.numel())], [parameter], places) for parameter, tensor in pairs]
    if stage == 3:
        shards = zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
        return [_slice(flat, _segments_of_stage_3(group), group, places) for flat, group in shards]
    shards = zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True)
    return [_slice(flat, _segments(group), group, places) for flat, group in shards]


def _slice(
    tensor: Tensor, segments: Iterable[tuple[Tensor, int, int, int]], group: list[Tensor], places: Mapping[int, int]
) -> Slice:
    own = [Segment(places[id(parameter)], *where) for parameter, *where in segments]
    return Slice(tensor, own, [places[id(parameter)] for parameter in group])


def _segments(group: list[Any]) -> Iterator[tuple[Tensor, int, int, int]]:
    """Yield (parameter, start, offset, numel) of stages 1 and 2, whose shards cut one long vector of all parameters."""
    for parameter in group:
        mapping = parameter._hp_mapping
        if mapping is not None:  # else other processes hold all of it
            there, here = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
            yield parameter, there.start, here.start, there.numel


def _segments_of_stage_3(group: list[Any]) -> Iterator[tuple[Tensor, int, int, int]]:
    """Yield (parameter, start, offset, numel) of stage 3, whose shards hold an equal share of each parameter."""
    start = 0
    for parameter in group:
        offset, numel = share_of_stage_3(parameter)
        if numel:
            yield parameter, start, offset, numel
        start += parameter.partition_numel()


def share_of_stage_3(parameter: Any) -> tuple[int, int]:
    """Return (offset, numel) of the elements of a flattened parameter that this process holds at stage 3, without padding."""
    share = parameter.partition_numel()
    offset = parameter.ds_process_group.rank() * share
    return offset, min(max(parameter.ds_numel - offset, 0), share)
