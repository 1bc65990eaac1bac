"""A swapped BERT that DeepSpeed trains on two processes: its weights after, and after a checkpoint was loaded again."""

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed.workers.shard_engine import engine_of, train
from helpers.hf_models import MODELS
from helpers.spawn import PATIENCE_S
from torch import Tensor

from xformer_train.launcher.processes.topology import Topology, quiet, start_processes, stop_processes
from xformer_train.recipes.policies import swap


def worker(stages: list[int]) -> dict[int, tuple[list[float], dict[str, Tensor], dict[str, Tensor]]]:
    """By ZeRO stage: gradient norms of the steps, the weights after them, and those that another engine loaded."""
    torch.set_num_threads(1)
    quiet(debug=False)
    topology = start_processes(PATIENCE_S)
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    results = {}
    for stage in stages:
        place = Path(folder[0], str(stage))
        engine = _engine(stage, topology)
        norms = train(engine, topology)
        engine.save_checkpoint(place)
        other = _engine(stage, topology)
        other.load_checkpoint(place)
        results[stage] = (norms, _weights(engine), _weights(other))
    stop_processes()
    return results


def _engine(stage: int, topology: Topology) -> Any:
    model = MODELS["bert"].build()
    swap(model)
    return engine_of(model, stage, topology)


def _weights(engine: Any) -> dict[str, Tensor]:
    """The state dict of the engine's model, whole."""
    import deepspeed  # as its import must come after `quiet`

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}
