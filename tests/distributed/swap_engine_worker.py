"""A swapped BERT that DeepSpeed trains on two processes: its weights after, and after a checkpoint was loaded again."""

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed.hf_models import MODELS
from distributed.shard_engine_worker import CLIPPING, REPLICAS, STEPS, loss_of, optimizer_of
from distributed.spawn import PATIENCE_S
from torch import Tensor

from xformer_train.launcher.engine import build_engine, grad_norm
from xformer_train.launcher.topology import quiet, start_processes, stop_processes
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
        norms = []
        for step in range(STEPS):
            engine.backward(loss_of(engine, step, topology.replica))
            engine.step()
            norms.append(float(grad_norm(engine) or 0.0))
        engine.save_checkpoint(place)
        other = _engine(stage, topology)
        other.load_checkpoint(place)
        results[stage] = (norms, _weights(engine), _weights(other))
    stop_processes()
    return results


def _engine(stage: int, topology: Any) -> Any:
    model = MODELS["bert"].build()
    swap(model)
    config = {
        "train_batch_size": 2 * REPLICAS,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": CLIPPING,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
    engine = build_engine(model, optimizer_of(model), config, topology)
    engine.eval()  # without dropout
    return engine


def _weights(engine: Any) -> dict[str, Tensor]:
    """The state dict of the engine's model, whole."""
    import deepspeed  # as its import must come after `quiet`

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}
