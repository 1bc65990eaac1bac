"""Put checkpoints together, and divide them anew for another ZeRO stage, number of replicas or tensor-parallel size.

Each process writes the parts it holds: DeepSpeed's files have the numbers, layout_rank{r}.json says which part of which
parameter lies where in them, and `partitions` in state.json how the processes of a replica cut a parameter.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.parallel.sharding import Partition, join_shards, partitions_of, shard_state_dict, take_shard
from ..optim.ema import EMA
from ..optim.slices import share_of_stage_3, slices_of
from ..processes.topology import Topology
from .files import listed, read_file

_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
_LOSS_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def partitions_record(module: torch.nn.Module) -> dict[str, Any]:
    """Return `partitions_of(module)` as JSON values."""
    return {name: [partition.dim, partition.parts] for name, partition in partitions_of(module).items()}


def layout_record(engine: Any) -> dict[str, Any]:
    """Return JSON values: the shape of each parameter on this process, and for each tensor of the optimizer its segments.

    A segment is [name, start in the tensor, offset in the parameter, numel], all flattened.
    """
    names = [name for name, _ in engine.module.named_parameters()]
    parameters = [parameter for _, parameter in engine.module.named_parameters()]
    slices = slices_of(engine, {id(parameter): place for place, parameter in enumerate(parameters)})
    return {
        # ZeRO stage 3 empties parameters
        "shapes": {n: list(getattr(p, "ds_shape", p.shape)) for n, p in zip(names, parameters, strict=True)},
        "segments": [[[names[place], *where] for place, *where in each.segments] for each in slices],
    }


def own_part(full: Mapping[str, Tensor], module: torch.nn.Module, topology: Topology) -> dict[str, Tensor]:
    """Return what this process holds of a full state dict of `module`."""
    return shard_state_dict(full, partitions_of(module), topology.tensor_rank, topology.tensor_parallel)


class _Part(NamedTuple):
    """Part of a parameter in one of a checkpoint's tensors, flattened; number: of the tensor in the optimizer's state dict."""

    replica: int
    number: int
    start: int
    offset: int
    numel: int


class Saved:
    """The weights and moments in a checkpoint by name of the parameter, whatever processes wrote it.

    Files are mapped into memory, so that only what is asked for is read.
    """

    def __init__(self, checkpoint: Path, state: Mapping[str, Any]) -> None:
        self.checkpoint, cuts = checkpoint, state["partitions"].items()
        self.partitions = {n: Partition(dim, None if parts is None else tuple(parts)) for n, (dim, parts) in cuts}
        self._state, facts = state, state["engine"]
        self.stage, self.tensor_parallel = int(facts["zero_stage"]), int(facts["tensor_parallel"])
        self._replicas = int(facts["world_size"]) // self.tensor_parallel if self.stage > 0 else 1
        self._files: dict[str, Any] = {}
        self._parts: list[dict[str, list[_Part]]] = []
        self._shapes: list[dict[str, list[int]]] = []
        for tensor_rank in range(self.tensor_parallel):
            layouts = [self._layout(replica, tensor_rank) for replica in range(self._replicas)]
            self._shapes.append(layouts[0]["shapes"])
            parts: dict[str, list[_Part]] = {name: [] for name in layouts[0]["shapes"]}
            for replica, layout in enumerate(layouts):
                for number, segments in enumerate(layout["segments"]):
                    for name, *where in segments:
                        parts[name].append(_Part(replica, number, *where))
            self._parts.append(parts)

    @property
    def names(self) -> list[str]:
        """Return the names of all parameters."""
        return list(self._shapes[0])

    def whole(self, name: str, key: str) -> Tensor:
        """Return the fp32 weight ("weight") or a moment of a parameter, as one process would hold it."""
        shards = [self._shard(tensor_rank, name, key) for tensor_rank in range(self.tensor_parallel)]
        return join_shards(shards, self.partitions[name], name) if name in self.partitions else shards[0]

    def state(self, name: str) -> Mapping[str, Tensor]:
        """Return the optimizer's state of a parameter as some process saved it: `step`, (), and a part of each moment.

        Empty if the parameter was not stepped yet, and without `step` for an optimizer that counts none.
        """
        part = self._parts[0][name][0]
        state: Mapping[str, Tensor] = self._optimizer(part.replica, 0)["state"].get(part.number, {})
        return state

    def moments(self) -> set[str]:
        """Return the names of the moments that the optimizer kept of the parameters; empty before its first step."""
        return {key for name in self.names for key in self.state(name)} - {"step", EMA}

    def model_file(self, tensor_rank: int) -> dict[str, Any]:
        """Return DeepSpeed's file of the module and the counters."""
        name = f"mp_rank_{tensor_rank:02d}_model_states.pt"
        return self._read(name if self.stage < 3 else f"zero_pp_rank_0_{name}")

    def _shard(self, tensor_rank: int, name: str, key: str) -> Tensor:
        shape = self._shapes[tensor_rank][name]
        parts = self._parts[tensor_rank][name]
        tensors = [self._tensor(part, tensor_rank, name, key).reshape(-1) for part in parts]
        shard = torch.empty(torch.Size(shape).numel(), dtype=tensors[0].dtype)
        for part, tensor in zip(parts, tensors, strict=True):
            # Unlike a slice, narrow fails on a tensor that is too short; one of one element would be spread over the place.
            shard.narrow(0, part.offset, part.numel).copy_(tensor.narrow(0, part.start, part.numel))
        return shard.view(shape)

    def _tensor(self, part: _Part, tensor_rank: int, name: str, key: str) -> Tensor:
        optimizer = self._optimizer(part.replica, tensor_rank)
        if key == "weight" and optimizer["weights"] is None:
            weight: Tensor = self.model_file(tensor_rank)["module"][name]
            return weight
        tensor: Tensor = optimizer["weights"][part.number] if key == "weight" else optimizer["state"][part.number][key]
        return tensor

    def _optimizer(self, replica: int, tensor_rank: int) -> dict[str, Any]:
        """Return `state` by index of the tensor, and `weights`, fp32 in that order, or None where they are the module's."""
        if self.stage == 0:
            inner = self.model_file(tensor_rank)["optimizer"]
            if "fp32_groups" not in inner:
                return {"state": inner["state"], "weights": None}
            copies = [copy for group in inner["fp32_groups"] for copy in group]
            return {"state": inner["optimizer_state_dict"]["state"], "weights": copies}
        name = f"zero_pp_rank_{replica}_mp_rank_{tensor_rank:02d}_optim_states.pt"
        in_bf16 = f"bf16_{name}"
        inner = self._read(in_bf16 if in_bf16 in self._state["files"] else name)["optimizer_state_dict"]
        if self.stage == 3:
            return {"state": inner["optimizer_state_dict"]["state"], "weights": inner["fp32_flat_groups"]}
        return {"state": inner["base_optimizer_state"]["state"], "weights": inner["single_partition_of_fp32_groups"]}

    def _layout(self, replica: int, tensor_rank: int) -> Any:
        rank = replica * self.tensor_parallel + tensor_rank
        return json.loads(listed(self.checkpoint, self._state, f"layout_rank{rank}.json").read_text(encoding="utf-8"))

    def _read(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = read_file(listed(self.checkpoint, self._state, name), mapped=True)
        return self._files[name]


@torch.no_grad()
def load_resharded(engine: Any, checkpoint: Path, state: Mapping[str, Any], topology: Topology) -> None:
    """Load weights, moments, loss scale and counters of a checkpoint that other processes or another ZeRO stage wrote.

    state: of the checkpoint. Numbers are copied, not computed: fp32 weights and moments are equal bit for bit. The model must
    have no buffers, as BERT and GPT have none.
    """
    saved = Saved(checkpoint, state)
    partitions = partitions_of(engine.module)
    parameters = dict(engine.module.named_parameters())
    names = list(parameters)

    def own(name: str, key: str) -> Tensor:
        """Return this process's part of a parameter's weight or moment, flattened."""
        whole = saved.whole(name, key)
        if name in partitions:
            whole = take_shard(whole, partitions[name], topology.tensor_rank, topology.tensor_parallel, name)
        return whole.reshape(-1)

    for each in slices_of(engine, {id(parameters[name]): place for place, name in enumerate(names)}):
        states = (saved.state(names[place]) for place in each.places)
        old: Mapping[str, Tensor] = next(filter(None, states), {})
        moments = {key: torch.zeros_like(each.tensor, dtype=torch.float32) for key in old if key != "step"}
        for place, start, offset, numel in each.segments:
            for key, tensor in (("weight", each.tensor), *moments.items()):
                tensor.view(-1)[start : start + numel] = own(names[place], key)[offset : offset + numel]
        if "step" in old:
            # fused optimizers count on the device
            on = each.tensor.device if engine.basic_optimizer.defaults.get("fused") else torch.device("cpu")
            moments["step"] = old["step"].to(on, torch.float32, copy=True)
        if old:
            engine.basic_optimizer.state[each.tensor] = moments
    for name, parameter in parameters.items():
        _set_weight(parameter, own(name, "weight"))
    counters = saved.model_file(0)
    for counter in _COUNTERS:
        setattr(engine, counter, counters[counter])
    scaler = _loss_scaler(engine)
    for name, value in state["loss_scaler"].items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)


def loss_scaler_record(engine: Any) -> dict[str, float]:
    """Return JSON values: the state of fp16's loss scale, empty in other precisions."""
    scaler = _loss_scaler(engine)
    return {name: getattr(scaler, name) for name in _LOSS_SCALER if hasattr(scaler, name)}


def _loss_scaler(engine: Any) -> Any:
    """Return what holds the loss scale: under ZeRO an object of its own, at stage 0 the wrapper's settings, or None."""
    if not engine.fp16_enabled():
        return None
    return getattr(engine.optimizer, "loss_scaler", None) or engine.optimizer.loss_scale_config


def _set_weight(parameter: Any, weight: Tensor) -> None:
    """Put a flat weight into a parameter, at ZeRO stage 3 into this process's share of it."""
    if not hasattr(parameter, "ds_tensor"):
        parameter.view(-1).copy_(weight)
        return
    offset, numel = share_of_stage_3(parameter)
    parameter.ds_tensor[:numel].copy_(weight[offset : offset + numel])
