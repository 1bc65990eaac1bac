"""A sharded BERT that DeepSpeed trains on four processes, two replicas of two: the model, its data, and its weights after."""

from typing import Any

import torch
from distributed.hf_models import MODELS
from distributed.spawn import PATIENCE_S
from torch import Tensor, nn

from xformer_train.launcher.engine import build_engine, grad_norm
from xformer_train.launcher.topology import quiet, start_processes, stop_processes
from xformer_train.recipes.policies import full_state_dict, shard, swap

STEPS, REPLICAS, CLIPPING = 3, 2, 0.5  # clipping acts: the norms are above 1


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    # The gradient of the keys' bias is rounding alone; this eps keeps Adam from making steps of it.
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)


def loss_of(model: Any, step: int, replica: int) -> Tensor:
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
        config = {
            "train_batch_size": 2 * REPLICAS,
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": CLIPPING,
            "zero_optimization": {"stage": stage},
            "steps_per_print": 2**31,
        }
        engine = build_engine(model, optimizer_of(model), config, topology)
        engine.eval()  # without dropout
        norms = []
        for step in range(STEPS):
            engine.backward(loss_of(engine, step, topology.replica))
            engine.step()
            norms.append(float(grad_norm(engine) or 0.0))
        results[stage, swapped] = (norms, full_state_dict(engine.module, topology.tensor_group))
    stop_processes()
    return results
