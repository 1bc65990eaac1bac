"""Fifty steps of LAMB at each ZeRO stage."""

from typing import Any

import torch
from helpers.spawn import PATIENCE_S
from helpers.tiny import WIDTH, tiny_model, whole_weights

from xformer_train.launcher.optim.engine import build_engine
from xformer_train.launcher.optim.lamb import Lamb
from xformer_train.launcher.processes.topology import quiet, start_processes, stop_processes

STEPS, BATCH = 50, 8


def lamb_worker(
    cases: list[tuple[int, str, dict[str, Any]]], outputs: int = WIDTH
) -> list[tuple[list[torch.Tensor], dict[int, float]]]:
    """(weights, trust ratios of the last step) of each case: ZeRO stage, precision, more keys of zero_optimization.

    outputs: of the model; fewer than WIDTH make it a single layer, with that many biases.
    """
    quiet(debug=False)
    topology = start_processes(PATIENCE_S)
    results = []
    for stage, precision, extra in cases:
        model = tiny_model(dropout=0.0) if outputs == WIDTH else _one_layer(outputs)
        decayed = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim == 1]
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        optimizer = Lamb(groups, lr=1e-2, weight_decay=0.1, max_coeff=0.9)
        config = {
            "train_batch_size": BATCH,
            "train_micro_batch_size_per_gpu": BATCH // topology.world_size,
            "gradient_clipping": 0.05,
            "zero_optimization": {"stage": stage, **extra},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": precision == "bf16"},
            "steps_per_print": 2**31,
        }
        engine = build_engine(model, optimizer, config, topology)
        if stage == 3:
            _spoil_padding(engine, topology.rank)
        for step in range(STEPS):
            _step(engine, step, topology.rank, topology.world_size, outputs)
        ratios = {place: float(ratio) for place, ratio in optimizer.trust_ratios().items()}
        results.append((whole_weights(engine), ratios))
    stop_processes()
    return results


def _one_layer(outputs: int) -> torch.nn.Module:
    torch.manual_seed(11)
    return torch.nn.Linear(WIDTH, outputs)


def _step(engine: Any, step: int, rank: int, world_size: int, outputs: int) -> None:
    dtype = torch.bfloat16 if engine.bfloat16_enabled() else torch.float32
    batch = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(step))
    own = batch.chunk(world_size)[rank]
    engine.backward((engine(own.to(dtype)).float() - own.flip(1)[:, :outputs]).square().mean())
    engine.step()


def _spoil_padding(engine: Any, rank: int) -> None:
    """NaN behind the last elements of stage 3's shards, where DeepSpeed leaves whatever was in memory."""
    for flat, group in zip(engine.optimizer.fp32_partitioned_groups_flat, engine.optimizer.fp16_groups, strict=True):
        start = 0
        for parameter in group:
            share = parameter.partition_numel()
            valid = min(max(parameter.ds_numel - rank * share, 0), share)
            flat.data[start + valid : start + share] = torch.nan
            start += share
