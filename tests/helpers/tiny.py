"""A network small enough to train in a test, its data as a function of step, micro-batch and rank, and its training loop."""

import os
import signal
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from helpers.spawn import PATIENCE_S
from torch import Tensor

from xformer_train.launcher.optim.engine import build_engine, grad_norm, set_learning_rate
from xformer_train.launcher.processes.signals import StopRequest
from xformer_train.launcher.processes.topology import Topology, quiet, start_processes, stop_processes

WIDTH, HIDDEN, MICRO_BATCH, ACCUMULATION, CLIPPING = 7, 13, 3, 2, 0.05  # clipping acts: the norms are near 0.2
MODEL = {"type": "bert", "hidden_size": HIDDEN, "hidden_dropout_prob": 0.2}


def tiny_model(dropout: float = 0.2) -> torch.nn.Module:
    """The same weights at every call."""
    torch.manual_seed(11)
    return torch.nn.Sequential(
        torch.nn.Linear(WIDTH, HIDDEN), torch.nn.GELU(), torch.nn.Dropout(dropout), torch.nn.Linear(HIDDEN, WIDTH)
    )


def tiny_optimizer(model: torch.nn.Module, weight_decay: float = 0.1, **options: Any) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    # Gradients are near 4e-3. Without such an eps one near nothing would have its sign, a matter of rounding, for a whole step.
    return torch.optim.AdamW(groups, lr=1e-2, eps=1e-3, weight_decay=weight_decay, **options)


def tiny_config(topology: Topology, stage: int, precision: str) -> dict[str, Any]:
    return {
        "train_batch_size": MICRO_BATCH * ACCUMULATION * topology.world_size,
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": CLIPPING,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": precision == "bf16"},
        "steps_per_print": 2**31,
    }


def tiny_engine(topology: Topology, stage: int, precision: str, dropout: float = 0.2, **options: Any) -> Any:
    """options: of AdamW."""
    model = tiny_model(dropout)
    engine = build_engine(model, tiny_optimizer(model, **options), tiny_config(topology, stage, precision), topology)
    torch.manual_seed(100 + topology.rank)
    return engine


def inputs(step: int, micro: int, rank: int) -> Tensor:
    """(MICRO_BATCH, WIDTH) fp32."""
    return torch.randn(MICRO_BATCH, WIDTH, generator=torch.Generator().manual_seed(step * 10_000 + micro * 100 + rank))


def learning_rate(step: int) -> float:
    return 1e-2 / (step + 1)


def train(engine: Any, topology: Topology, first: int, last: int) -> list[tuple[float, float | None]]:
    """(this process's summed loss, gradient norm) of the steps from `first` up to `last`, last excluded."""
    dtype = torch.bfloat16 if engine.bfloat16_enabled() else torch.float32
    record = []
    for step in range(first, last):
        set_learning_rate(engine, learning_rate(step))
        total = 0.0
        for micro in range(ACCUMULATION):
            x = inputs(step, micro, topology.rank)
            loss = (engine(x.to(dtype)).float() - x.flip(1)).square().mean()
            engine.backward(loss)
            engine.step()
            total += loss.item()
        record.append((total, grad_norm(engine)))
    return record


def whole_weights(engine: Any) -> list[Tensor]:
    """Every parameter in full, fp32 copies."""
    parameters = list(engine.module.parameters())
    if engine.zero_optimization_stage() < 3:
        return [p.detach().float().clone() for p in parameters]
    with deepspeed.zero.GatheredParameters(parameters):
        return [p.detach().float().clone() for p in parameters]


def stages_worker(stages: list[tuple[int, str]]) -> dict[tuple[int, str], Any]:
    """Records and final weights of three steps without dropout at each (stage, precision)."""
    quiet(debug=False)
    topology = start_processes(PATIENCE_S)
    results = {}
    for stage, precision in stages:
        engine = tiny_engine(topology, stage, precision, dropout=0.0)
        results[stage, precision] = (train(engine, topology, 0, 3), whole_weights(engine))
    stop_processes()
    return results


def agreement_worker() -> dict[str, Any]:
    """What the processes get to know of each other where they differ, how long a group waits that is made without a timeout, as
    DeepSpeed's are, and what process 0 meets in the end when it has waited as long and process 1 does not join it."""
    topology = start_processes(PATIENCE_S)
    mine = torch.tensor([topology.rank + 1.0])
    with StopRequest(topology) as stop:
        agreed_before = stop.agreed_now()
        if topology.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        agreed_after = stop.agreed_now()
        stop.agreed()  # which is not answered before the next call
        largest = stop.agreed_with(topology.rank, 0.25 - topology.rank)
    known = {
        "largest": largest,
        "agreed": (agreed_before, agreed_after, stop.received is not None),
        "sum": (topology.sum(mine).item(), mine.item()),
        "broadcast": topology.broadcast({"rank": topology.rank}),
        "gather": topology.gather(topology.rank),
    }
    group = dist.new_group()
    known["timeout"] = group._get_backend(topology.device).options._timeout.total_seconds()
    store = dist.distributed_c10d._get_default_store()
    if topology.rank == 1:
        # Alive and silent: a closed connection would be noticed without any timeout.
        store.wait(["process 0 gave up"], timedelta(seconds=PATIENCE_S))
        return known
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), group)  # nothing but this waits from here on
    try:
        dist.all_reduce(torch.ones(1), group=group)
        return known | {"error": None}
    except RuntimeError as error:
        return known | {"error": str(error)}
    finally:
        store.set("process 0 gave up", "")
