"""A BERT in two replicas of two processes that DeepSpeed trains sharded: its data, its steps, and its weights after."""

from typing import Any

import torch
from helpers.hf_models import MODELS
from helpers.spawn import PATIENCE_S
from torch import Tensor, nn

from xformer_train.launcher.optim.engine import build_engine, grad_norm
from xformer_train.launcher.processes.topology import Topology, quiet, start_processes, stop_processes
from xformer_train.recipes.policies import full_state_dict, shard, swap

STEPS, REPLICAS, CLIPPING = 3, 2, 0.5  # clipping acts: the norms are above 1


def steps_of_one_process() -> tuple[list[float], dict[str, Tensor]]:
    """Gradient norms and final weights of the stock model on the batches of all replicas, without DeepSpeed."""
    model = MODELS["bert"].build()
    optimizer = _optimizer_of(model)
    norms = []
    for step in range(STEPS):
        for replica in range(REPLICAS):
            (_loss_of(model, step, replica) / REPLICAS).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms, model.state_dict()


def engine_of(model: nn.Module, stage: int, topology: Topology) -> Any:
    """DeepSpeed's engine for a model that is sharded or swapped, at a ZeRO stage."""
    config = {
        "train_batch_size": 2 * REPLICAS,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": CLIPPING,
        "zero_optimization": {"stage": stage},
        "steps_per_print": 2**31,
    }
    engine = build_engine(model, _optimizer_of(model), config, topology)
    engine.eval()  # without dropout
    return engine


def train(engine: Any, topology: Topology) -> list[float]:
    """Gradient norms of all steps, on the batches of this replica."""
    norms = []
    for step in range(STEPS):
        engine.backward(_loss_of(engine, step, topology.replica))
        engine.step()
        norms.append(float(grad_norm(engine) or 0.0))
    return norms


def _optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    # The gradient of the keys' bias is rounding alone; this eps keeps Adam from making steps of it.
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)


def _loss_of(model: Any, step: int, replica: int) -> Tensor:
    loss: Tensor = model(**MODELS["bert"].make_inputs(seed=10 * step + replica)).loss
    return loss


def worker(cases: list[tuple[int, bool]]) -> dict[tuple[int, bool], tuple[list[float], dict[str, Tensor]]]:
    """By ZeRO stage and whether the model is swapped too: gradient norms of the steps, and the weights after them as one
    process would have them."""
    torch.set_num_threads(1)
    quiet(debug=False)
    topology = start_processes(PATIENCE_S, tensor_parallel=2)
    assert topology.tensor_group is not None
    results = {}
    for stage, swapped in cases:
        model = MODELS["bert"].build()
        shard(model, topology.tensor_group)
        if swapped:
            swap(model)
        engine = engine_of(model, stage, topology)
        norms = train(engine, topology)
        results[stage, swapped] = (norms, full_state_dict(engine.module, topology.tensor_group))
    stop_processes()
    return results
