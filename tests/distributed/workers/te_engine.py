"""te modules that DeepSpeed trains: the model, its data, and what each process gets to know."""

from typing import Any

import torch
from helpers.spawn import PATIENCE_S
from helpers.tiny import ACCUMULATION, MICRO_BATCH, tiny_config, whole_weights
from torch import Tensor, nn

from xformer_train.kernels import te
from xformer_train.launcher.optim.engine import build_engine
from xformer_train.launcher.processes.topology import Topology, quiet, start_processes, stop_processes

LENGTH, WIDTH, STEPS = 5, 16, 3


class Model(nn.Module):
    """The layer of a BERT, whose last norm and biases are used outside of the modules that own them, and three others."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        torch.manual_seed(11)
        shared: dict[str, Any] = {"fuse_wgrad_accumulation": fused}
        post_ln = {"output_layernorm": True, "apply_residual_connection_post_layernorm": True}
        without_dropout = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
        self.layer = te.TransformerLayer(
            WIDTH, 32, 2, fuse_qkv_params=True, self_attn_mask_type="no_mask", **post_ln, **without_dropout, **shared
        )
        self.mlp = te.LayerNormMLP(WIDTH, 32, **shared)
        self.pooler = te.LayerNormLinear(WIDTH, WIDTH, **shared)
        self.head = te.Linear(WIDTH, WIDTH, **shared)

    def forward(self, x: Tensor, is_first_microbatch: bool) -> Tensor:
        x = self.layer(x, is_first_microbatch=is_first_microbatch)
        for module in (self.mlp, self.pooler, self.head):
            x = module(x, is_first_microbatch=is_first_microbatch)
        return x


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    # The gradient of the keys' bias is rounding alone; this eps keeps Adam from making steps of it.
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)


def inputs(step: int, micro: int, rank: int) -> Tensor:
    """(LENGTH, MICRO_BATCH, WIDTH) fp32."""
    generator = torch.Generator().manual_seed(step * 10_000 + micro * 100 + rank)
    return torch.randn(LENGTH, MICRO_BATCH, WIDTH, generator=generator)


def loss_of(model: Any, step: int, micro: int, rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = inputs(step, micro, rank)
    out: Tensor = model(x.to(dtype), is_first_microbatch=micro == 0)
    return (out.float() - x.flip(2)).square().mean()


def worker(stages: list[tuple[int, str]]) -> dict[Any, Any]:
    """Final weights by (stage, precision, whether fused), then by stage what a weight with main_grad says."""
    torch.set_num_threads(1)
    quiet(debug=False)
    topology = start_processes(PATIENCE_S)
    results: dict[Any, Any] = {}
    for stage, precision in stages:
        for fused in (True, False):
            engine = _engine(Model(fused=fused), topology, stage, precision)
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            for step in range(STEPS):
                for micro in range(ACCUMULATION):
                    engine.backward(loss_of(engine, step, micro, topology.rank, dtype))
                    engine.step()
            results[stage, precision, fused] = whole_weights(engine)
    for stage in (1, 2, 3):
        model = Model(fused=True)
        for parameter in model.parameters():
            parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]
        try:
            loss_of(_engine(model, topology, stage, "fp32"), 0, 0, topology.rank)
            results[stage] = "no error"
        except ValueError as error:
            results[stage] = str(error)
    stop_processes()
    return results


def _engine(model: nn.Module, topology: Topology, stage: int, precision: str) -> Any:
    config = tiny_config(topology, stage, precision) | {"gradient_clipping": 0.0}
    return build_engine(model, optimizer_of(model), config, topology)
