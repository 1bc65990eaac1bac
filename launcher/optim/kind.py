"""What the file of an optimizer gives the launcher, and the parameter groups that it starts from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import ProcessGroup

from ...kernels.errors import UserError
from ..config.optimizers import OptimizerConfig
from ..config.schema import Precision

Build = Callable[[torch.nn.Module, OptimizerConfig, ProcessGroup | None, Precision], torch.optim.Optimizer]


@dataclass(frozen=True)
class OptimizerKind:
    """What the launcher must know of one optimizer, beside its keys in `launcher/config/optimizers.py`.

    The state of a parameter is `step`, one number, where the optimizer counts steps, and tensors of the parameter's shape, in
    fp32 and under any names. Such a state is saved, and divided anew for another ZeRO stage or number of processes, without a
    word about it here. An optimizer that must know which parameters ZeRO's flat shards hold has a method `divide` (see
    `slices.SteppedInSlices`).
    """

    build: Build
    """This function returns the optimizer of a model at the base learning rate. Its third argument is the group of processes
    that divide the sharded parameters, its fourth what the run trains in."""
    text: Callable[[OptimizerConfig, Precision], str] = lambda config, precision: ""
    """This function returns what the start-up report says beside the keys that all optimizers have, with a comma in front."""
    histograms: Callable[[Any], Mapping[str, Sequence[float]]] = lambda optimizer: {}
    """This function returns figures of the last step for TensorBoard, by name. It waits for the device."""


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups: matrices and embeddings, with weight_decay, then biases and LayerNorm parameters, with none.

    The test is the number of dimensions (two or more: decayed), not the name. Tied weights are listed once, frozen ones
    not at all, and a group that would be empty is left out. Raises UserError if nothing is trainable.
    """
    trainable = [param for param in model.parameters() if param.requires_grad]
    if not trainable:
        raise UserError("model has no trainable parameter, so there is nothing to optimize; set requires_grad")
    decayed = [param for param in trainable if param.ndim >= 2]
    undecayed = [param for param in trainable if param.ndim < 2]
    groups = ((decayed, weight_decay), (undecayed, 0.0))
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]
