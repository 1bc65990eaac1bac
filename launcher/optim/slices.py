"""Where the parameters lie in the tensors that the optimizer steps: themselves, copies, or ZeRO's flat shards of many."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor


class Segment(NamedTuple):
    """A part of one parameter in a tensor of the optimizer: numel elements, from `start` there, from `offset` in the parameter.

    place: the parameter's number, see `slices_of`.
    """

    place: int
    start: int
    offset: int
    numel: int


class Slice(NamedTuple):
    """A tensor that the optimizer steps, this process's segments in it, and the parameters of which any process has one.

    ZeRO's are flat; what is in no segment is padding, and may be uninitialised.
    """

    tensor: Tensor
    segments: list[Segment]
    places: list[int]


def slices_of(engine: Any, places: Mapping[int, int]) -> list[Slice]:
    """What the optimizer of a `deepspeed.DeepSpeedEngine` steps on this process, in the order of its state dict.

    places: by id() of a parameter of the model, a number of the caller's for it.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        copies = getattr(optimizer, "fp32_groups", None)  # of wrappers for fp16 and bf16
        parameters = [group["params"] for group in optimizer.param_groups]
        if copies is not None:
            parameters, stepped = optimizer.fp16_groups, copies
        else:
            stepped = parameters
        pairs = [pair for group, own in zip(parameters, stepped, strict=True) for pair in zip(group, own, strict=True)]
        return [_slice(tensor, [(parameter, 0, 0, tensor.numel())], [parameter], places) for parameter, tensor in pairs]
    if stage == 3:
        shards = zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
        return [_slice(flat, _segments_of_stage_3(group), group, places) for flat, group in shards]
    if hasattr(optimizer, "bf16_groups"):  # stage 1 with bf16 parameters and fp32 gradients
        shards = zip(optimizer.fp32_groups_flat_partition, optimizer.bf16_groups, strict=True)
    else:
        shards = zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True)
    return [_slice(flat, _segments(group), group, places) for flat, group in shards]


def _slice(
    tensor: Tensor, segments: Iterable[tuple[Tensor, int, int, int]], group: list[Tensor], places: Mapping[int, int]
) -> Slice:
    own = [Segment(places[id(parameter)], *where) for parameter, *where in segments]
    return Slice(tensor, own, [places[id(parameter)] for parameter in group])


def _segments(group: list[Any]) -> Iterator[tuple[Tensor, int, int, int]]:
    """(parameter, start, offset, numel) of stages 1 and 2, whose shards cut one long vector of all parameters."""
    for parameter in group:
        mapping = parameter._hp_mapping
        if mapping is not None:  # else other processes hold all of it
            there, here = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
            yield parameter, there.start, here.start, there.numel


def _segments_of_stage_3(group: list[Any]) -> Iterator[tuple[Tensor, int, int, int]]:
    """(parameter, start, offset, numel) of stage 3, whose shards hold an equal share of each parameter, the last padded."""
    start = 0
    for parameter in group:
        share = parameter.partition_numel()
        offset = parameter.ds_process_group.rank() * share
        numel = min(max(parameter.ds_numel - offset, 0), share)
        if numel:
            yield parameter, start, offset, numel
        start += share
