"""Steps of Muon over several processes, and on one."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from helpers.spawn import PATIENCE_S
from torch import Tensor

from xformer_train.kernels import LayerConfig
from xformer_train.kernels.layers.layer import TransformerLayer
from xformer_train.kernels.parallel.collectives import TensorParallel
from xformer_train.kernels.parallel.sharding import join_state_dicts, partitions_of
from xformer_train.launcher.config.optimizers import OptimizerConfig
from xformer_train.launcher.optim.engine import build_engine, step_was_skipped
from xformer_train.launcher.optim.optimizer import build_optimizer
from xformer_train.launcher.processes.topology import Topology, quiet, start_processes, stop_processes

BATCH, LENGTH, WIDTH = 4, 5, 8


@dataclass(frozen=True)
class Case:
    """One training. zero: more keys of zero_optimization. layer: keys of LayerConfig.

    alike: every replica gets the whole batch, so that gradients are equal to the bit whatever the number of replicas.
    """

    stage: int
    precision: str = "fp32"
    zero: dict[str, Any] = field(default_factory=dict)
    layer: dict[str, Any] = field(default_factory=dict)
    steps: int = 12
    alike: bool = True


class Model(torch.nn.Module):
    """A layer between two matrices that are none of its own."""

    def __init__(self, layer: dict[str, Any], parallel: TensorParallel) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.enter = torch.nn.Linear(WIDTH, WIDTH)
        sizes = {"hidden_size": WIDTH, "num_attention_heads": 4, "intermediate_size": 12, "pre_layer_norm": True}
        config = LayerConfig(**sizes | layer, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
        self.layer = TransformerLayer(config, parallel)
        self.leave = torch.nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.layer(self.enter(x)))


def muon_worker(cases: list[Case], tensor_parallel: int = 1) -> list[dict[str, Tensor]]:
    """The whole weights after each case, in fp32. Each ends with a gradient that is not finite, which must change nothing."""
    quiet(debug=False)
    topology = start_processes(PATIENCE_S, tensor_parallel)
    results = [_train(case, topology) for case in cases]
    stop_processes()
    return results


def _train(case: Case, topology: Topology) -> dict[str, Tensor]:
    model = Model(case.layer, TensorParallel(topology.tensor_group))
    # Without such an eps AdamW would step by the sign of gradients near nothing, which is a matter of rounding.
    config = OptimizerConfig(type="muon", lr=1e-3, weight_decay=0.1, eps=1e-3, newton_schulz_dtype="fp32")
    optimizer = build_optimizer(model, config, topology.tensor_group)
    replicas, micro_batch = topology.num_replicas, BATCH if case.alike else BATCH // topology.num_replicas
    ds_config = {
        "train_batch_size": micro_batch * replicas,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_clipping": 0.0 if case.alike else 0.05,  # the norm is a sum in another order at each stage
        "zero_optimization": {"stage": case.stage, **case.zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": case.precision == "bf16"},
        "communication_data_type": "fp32",  # sums of bf16 gradients would depend on their order
        "steps_per_print": 2**31,
    }
    engine = build_engine(model, optimizer, ds_config, topology)
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    for step in range(case.steps):
        generator = torch.Generator().manual_seed(step)
        x, y = (torch.randn(BATCH, LENGTH, width, generator=generator) for width in (WIDTH, 3))
        if not case.alike:
            x, y = (whole.chunk(replicas)[topology.replica] for whole in (x, y))
        engine.backward((engine(x.to(dtype)).float() - y).square().mean())
        engine.step()
    weights, state = _whole_weights(engine, topology), copy.deepcopy(list(optimizer.state.values()))
    engine.backward((engine(x.to(dtype)).float() * torch.nan).sum())
    engine.step()
    assert step_was_skipped(engine)
    assert all(torch.equal(weights[name], same) for name, same in _whole_weights(engine, topology).items())
    for before, after in zip(state, optimizer.state.values(), strict=True):
        assert all(torch.equal(before[key], after[key]) for key in after), (
            "a gradient that is not finite has moved the state"
        )
    return weights


def _whole_weights(engine: Any, topology: Topology) -> dict[str, Tensor]:
    import deepspeed

    partitions, parameters = partitions_of(engine.module), dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=engine.zero_optimization_stage() == 3):
        own = {name: p.detach().float().clone() for name, p in parameters.items()}
    if topology.tensor_parallel == 1:
        return own
    everyones: list[Any] = [None] * topology.tensor_parallel
    dist.all_gather_object(everyones, own, group=topology.tensor_group)
    return join_state_dicts(everyones, partitions)
