"""The optimizers that a run config can name."""

import torch
from torch.distributed import ProcessGroup

from ..config.optimizers import OptimizerConfig
from .adamw import ADAMW
from .lamb import LAMB

OPTIMIZERS = {"lamb": LAMB, "adamw": ADAMW}


def build_optimizer(
    model: torch.nn.Module, config: OptimizerConfig, tensor_group: ProcessGroup | None = None
) -> torch.optim.Optimizer:
    """Return the config's optimizer over the parameters of model, at the base learning rate; the schedule sets it later.

    tensor_group: the processes among which the model's sharded parameters are divided.
    Raises UserError if nothing is trainable, or if the optimizer does not have what the config asks for.
    """
    return OPTIMIZERS[config.type].build(model, config, tensor_group)


def moments_of(config: OptimizerConfig) -> set[str]:
    """Return the names of the tensors that the config's optimizer keeps of a parameter from step to step."""
    module = torch.nn.ParameterList([torch.zeros(1, 1)])
    optimizer = build_optimizer(module, config)
    module[0].grad = torch.ones(1, 1)
    optimizer.step()
    return {name for state in optimizer.state.values() for name in state} - {"step"}
