"""The optimizers that a run config can name."""

import torch
from torch.distributed import ProcessGroup

from ...kernels.layers.projection import Projection
from ..config.optimizers import OptimizerConfig
from ..config.schema import Precision
from .adamw import ADAMW
from .lamb import LAMB
from .muon import MUON

OPTIMIZERS = {"lamb": LAMB, "adamw": ADAMW, "muon": MUON}


def build_optimizer(
    model: torch.nn.Module,
    config: OptimizerConfig,
    tensor_group: ProcessGroup | None = None,
    precision: Precision = "fp32",
) -> torch.optim.Optimizer:
    """Return the config's optimizer over the parameters of model, at the base learning rate; the schedule sets it later.

    tensor_group: the processes among which the model's sharded parameters are divided. precision: what the run trains in.
    Raises UserError if nothing is trainable, or if the optimizer does not have what the config asks for.
    """
    return OPTIMIZERS[config.type].build(model, config, tensor_group, precision)


def moments_of(config: OptimizerConfig) -> set[str]:
    """Return the names of the tensors that the config's optimizer keeps of parameters from step to step."""
    module = Projection(1, 1)
    optimizer = build_optimizer(module, config)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {name for state in optimizer.state.values() for name in state} - {"step"}
