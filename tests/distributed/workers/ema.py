"""Steps with a mean of the weights at each ZeRO stage, one of them left out, and evaluations with it in between."""

from typing import Any

import torch
import torch.distributed as dist
from helpers.spawn import PATIENCE_S
from helpers.tiny import WIDTH, tiny_config, tiny_model, tiny_optimizer, whole_weights
from torch import Tensor

from xformer_train.kernels.parallel.sharding import Partition
from xformer_train.launcher.config.optimizers import OptimizerConfig
from xformer_train.launcher.optim.ema import EMA, keep_mean, mean_in_model
from xformer_train.launcher.optim.engine import build_engine, step_was_skipped
from xformer_train.launcher.optim.lamb import Lamb
from xformer_train.launcher.optim.muon import Muon
from xformer_train.launcher.optim.slices import slices_of
from xformer_train.launcher.optim.whole_matrices import matrices_in
from xformer_train.launcher.processes.topology import Topology, quiet, start_processes, stop_processes

DECAY, STEPS, BAD_STEP = 0.75, 6, 3
Case = tuple[int, str, str, dict[str, Any]]


def ema_worker(cases: list[Case]) -> list[dict[str, Any]]:
    """What `_train` returns for each case: ZeRO stage, precision, optimizer, more keys of zero_optimization."""
    quiet(debug=False)
    topology = start_processes(PATIENCE_S)
    results = [_train(case, topology) for case in cases]
    stop_processes()
    return results


def _train(case: Case, topology: Topology) -> dict[str, Any]:
    """The fp32 weights before each step and after the last, which steps were skipped, whether each evaluation put the weights
    back, the mean at the end, and the weights and the output of the model in the last evaluation.
    """
    engine = _engine(case, topology)
    history, skipped, put_back, seen = [_whole(engine, None)], [], [], {}
    for step in range(STEPS):
        _step(engine, step, topology.rank)
        skipped.append(step_was_skipped(engine))
        history.append(_whole(engine, None))
        before = whole_weights(engine)
        with mean_in_model(engine, topology):
            engine.eval()
            with torch.no_grad():
                output = engine(_input(engine)).float()
            engine.train()
            seen = {"model": whole_weights(engine), "output": output}
        after = whole_weights(engine)
        put_back.append(all(map(torch.equal, before + history[-1], after + _whole(engine, None))))
    return {"weights": history, "skipped": skipped, "put back": all(put_back), "mean": _whole(engine, EMA), **seen}


def _engine(case: Case, topology: Topology) -> Any:
    stage, precision, kind, extra = case
    model = tiny_model(dropout=0.0)
    optimizer = {"adamw": tiny_optimizer, "lamb": _lamb, "muon": _muon}[kind](model)
    keep_mean(optimizer, DECAY)
    config = tiny_config(topology, stage, precision) | {
        "gradient_accumulation_steps": 1,
        "train_batch_size": 3 * topology.world_size,
        "zero_optimization": {"stage": stage, **extra},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return build_engine(model, optimizer, config, topology)


def _lamb(model: torch.nn.Module) -> Lamb:
    return Lamb(model.parameters(), lr=1e-2, weight_decay=0.1)


def _muon(model: torch.nn.Module) -> Muon:
    weights, others = ([p for p in model.parameters() if (p.ndim == 2) == matrix] for matrix in (True, False))
    matrices = {place: matrices_in(weight.shape, Partition(0), 1) for place, weight in enumerate(weights)}
    groups = [{"params": weights, "orthogonal": True}, {"params": others, "weight_decay": 0.0}]
    options = OptimizerConfig(type="muon", lr=1e-2).model_dump(
        include={"lr", "betas", "eps", "weight_decay", "momentum", "nesterov", "newton_schulz_steps", "adjust_lr"}
    )
    return Muon(groups, matrices=matrices, newton_schulz_dtype="fp32", **options)


def _input(engine: Any) -> Tensor:
    dtype = torch.bfloat16 if engine.bfloat16_enabled() else torch.float32
    return torch.linspace(-1, 1, 2 * WIDTH).view(2, WIDTH).to(dtype)


def _step(engine: Any, step: int, rank: int) -> None:
    dtype = torch.bfloat16 if engine.bfloat16_enabled() else torch.float32
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(100 * step + rank))
    loss = (engine(x.to(dtype)).float() - x.flip(1)).square().mean()
    engine.backward(loss * (torch.inf if step == BAD_STEP and rank == 0 else 1.0))
    engine.step()


def _whole(engine: Any, key: str | None) -> list[Tensor]:
    """Each parameter's fp32 weight, or tensor of the optimizer's state, put together from all processes."""
    parameters = list(engine.module.parameters())
    whole = [torch.zeros(getattr(p, "ds_numel", p.numel())) for p in parameters]
    for each in slices_of(engine, {id(p): place for place, p in enumerate(parameters)}):
        tensor = each.tensor if key is None else engine.basic_optimizer.state[each.tensor][key]
        for place, start, offset, numel in each.segments:
            whole[place][offset : offset + numel] = tensor.detach().view(-1)[start : start + numel]
    if engine.zero_optimization_stage() > 0:
        for tensor in whole:
            dist.all_reduce(tensor)
    return whole
