"""Stacks with activation checkpointing that two processes share, and that DeepSpeed trains at every ZeRO stage."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from helpers.spawn import PATIENCE_S
from helpers.tiny import ACCUMULATION, MICRO_BATCH, tiny_config, whole_weights
from saved_activations import count_saved_bytes
from torch import Tensor, nn

from xformer_train.kernels import AttentionMask, LayerConfig, LayerStack
from xformer_train.kernels.parallel.collectives import TensorParallel
from xformer_train.launcher.optim.engine import build_engine
from xformer_train.launcher.processes.topology import Topology, quiet, start_processes, stop_processes

LENGTH, CHOICES, STAGES = 6, ("none", "selective", "full"), (0, 1, 2, 3)
CONFIG = LayerConfig(32, 4, 64, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2, initializer_range=0.2)


def shared(group: dist.ProcessGroup) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Output and gradients of one step, by what the processes share and the choice; bytes too, of two layers."""
    for sequence in (False, True):
        for fp8 in (False, True):
            for choice in CHOICES:
                torch.manual_seed(0)
                parallel = TensorParallel(group, sequence)
                stack = LayerStack(CONFIG, 2, fp8=fp8, activation_checkpointing=choice, parallel=parallel)
                torch.manual_seed(1)
                x = torch.randn(2, LENGTH, 32).requires_grad_()
                mask = AttentionMask(causal=True)
                out = stack(x, mask)
                out.backward(torch.randn(out.shape))
                gradients = {name: p.grad for name, p in stack.named_parameters()}
                result = {"output": out.detach(), "input": x.grad, **gradients, "generator": torch.get_rng_state()}
                kept = count_saved_bytes(lambda s=stack: s(x, mask), stack.parameters())  # noqa: B023
                yield f"{choice}, sequence={sequence}, fp8={fp8}", result | {"bytes": torch.tensor(kept)}


class Model(nn.Module):
    def __init__(self, choice: Any) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.layers = LayerStack(CONFIG, 2, activation_checkpointing=choice)
        self.head = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layers(x, AttentionMask(causal=True)))
        return out


def trained(stage: int, choice: str, topology: Topology) -> list[Tensor]:
    """The weights after two steps with dropout."""
    model = Model(choice)
    config = tiny_config(topology, stage, "bf16") | {"gradient_clipping": 0.0}
    engine = build_engine(model, torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3), config, topology)
    torch.manual_seed(topology.rank)
    for _ in range(2 * ACCUMULATION):
        x = torch.randn(MICRO_BATCH, LENGTH, 32).bfloat16()
        engine.backward((engine(x).float() - x.flip(2)).square().mean())
        engine.step()
    return whole_weights(engine)


def worker() -> dict[str, dict[str, Any]]:
    """`shared` by name, and the trained weights by stage and choice."""
    torch.set_num_threads(1)
    quiet(debug=False)
    topology = start_processes(PATIENCE_S)
    engines = {f"{stage} {choice}": trained(stage, choice, topology) for stage in STAGES for choice in CHOICES}
    results = {"shared": dict(shared(dist.group.WORLD)), "engines": engines}
    stop_processes()
    return results
