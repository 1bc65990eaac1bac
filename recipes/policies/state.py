"""Put the parts of a sharded or swapped model together again."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...kernels.errors import UserError
from ...kernels.parallel.sharding import Partition, join_shards
from .sharding.modules import Sharded
from .swapping.fused_layer import stock_partitions


def full_state_dict(model: nn.Module, tp_group: dist.ProcessGroup) -> dict[str, Tensor]:
    """The state dict that the model had before `shard`, bit for bit, on the CPU of every process; call it on all of the group.

    A copy, that later steps do not change. Parameters that are tied are one tensor. The model may be swapped, or a copy.

    Raises ValueError for a model of which nothing is marked as a shard, and where adapters stand around shards.
    """
    partitions = stock_partitions(model)
    if not partitions:
        raise UserError(
            f"no parameter of this {type(model).__name__} is marked as a shard; give the model that shard(model, group) cut, "
            f"or a copy of it"
        )
    for module in model.modules():
        if isinstance(module, Sharded):
            module.check_place()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    whole: dict[int, Tensor] = {}
    state = {}
    for name, tensor in model.state_dict().items():
        parameter = parameters.get(name, tensor)  # those of swapped layers have other names there, and are not tied
        if id(parameter) not in whole:
            own, partition = tensor.detach(), partitions.get(name)
            if partition is None:
                whole[id(parameter)] = own.to("cpu", copy=True)
            else:
                whole[id(parameter)] = _gather(own, partition, name, tp_group)[: partition.rows]
        state[name] = whole[id(parameter)]
    return state


def _gather(own: Tensor, partition: Partition, name: str, group: dist.ProcessGroup) -> Tensor:
    """The whole of everyone's shards, on the CPU."""
    own = own.contiguous()
    shards = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(shards, own, group)
    return join_shards([one.cpu() for one in shards], partition, name)
