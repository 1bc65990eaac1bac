"""Where the parameters lie in the flat shards that DeepSpeed's ZeRO hands to an optimizer in their place."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from .lamb import Segment, Slice


def zero_slices(engine: Any, places: Mapping[int, int]) -> list[Slice]:
    """The flat shards of this process, for `Lamb.divide`; engine: at ZeRO stage 1, 2 or 3, before its first step.

    places: by id() of a parameter of the model, its place among all in the order of the optimizer's groups.
    """
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        shards = zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
        return [_slice(flat, list(_segments_of_stage_3(group)), group, places) for flat, group in shards]
    if hasattr(optimizer, "bf16_groups"):  # stage 1 with bf16 parameters and fp32 gradients
        shards = zip(optimizer.fp32_groups_flat_partition, optimizer.bf16_groups, strict=True)
    else:
        shards = zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True)
    return [_slice(flat, list(_segments(group)), group, places) for flat, group in shards]


def _slice(
    flat: Tensor, segments: list[tuple[Tensor, int, int]], group: list[Tensor], places: Mapping[int, int]
) -> Slice:
    own = [Segment(places[id(parameter)], start, numel) for parameter, start, numel in segments]
    return Slice(flat, own, [places[id(parameter)] for parameter in group])


def _segments(group: list[Tensor]) -> Iterator[tuple[Tensor, int, int]]:
    """(parameter, start, numel) of stages 1 and 2, whose shards cut one long vector of all parameters."""
    for parameter in group:
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:  # another process holds all of it
            address = mapping.get_hp_fragment_address()
            yield parameter, address.start, address.numel


def _segments_of_stage_3(group: list[Any]) -> Iterator[tuple[Tensor, int, int]]:
    """(parameter, start, numel) of stage 3, whose shards hold an equal share of each parameter, the last ones padded."""
    start = 0
    for parameter in group:
        share = parameter.partition_numel()
        rank = parameter.ds_process_group.rank()
        numel = min(max(parameter.ds_numel - rank * share, 0), share)
        if numel:
            yield parameter, start, numel
        start += share
