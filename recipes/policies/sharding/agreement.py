"""Whether the processes that share a model compute the same: asked once, because otherwise nothing but the loss would tell."""

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ....kernels.errors import UserError


def check_first_forward(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Lets the model's first forward in training, and in evaluation, raise ValueError on all processes, if not all of the
    group were given the same tensors, or, in training with dropout, if torch's default generators differ."""
    modes = {True, False}

    def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training not in modes:
            return
        modes.remove(module.training)
        generator = torch.get_rng_state() if module.training and _drops(module) else torch.empty(0)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        device = next(module.parameters()).device
        mine = torch.tensor([_digest(tensors), _digest([generator])], device=device)
        everyones = [torch.empty_like(mine) for _ in range(group.size())]
        dist.all_gather(everyones, mine, group)
        same_inputs, same_generator = (torch.stack(everyones) == everyones[0]).all(0).tolist()
        if not same_inputs:
            raise UserError(
                "the processes that share this model were given different batches; give all of a tensor-parallel group the "
                "same one, for example by a sampler that counts groups, not processes"
            )
        if not same_generator:
            raise UserError(
                "the processes that share this model would drop different hidden states; seed torch alike on all of a "
                "tensor-parallel group"
            )

    model.register_forward_pre_hook(check, with_kwargs=True)


def _digest(tensors: list[Tensor]) -> int:
    """64 bits of the tensors' values."""
    hashed = hashlib.sha256()
    for tensor in tensors:
        hashed.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return int.from_bytes(hashed.digest()[:8], "big", signed=True)


def _drops(model: nn.Module) -> bool:
    """Whether the model has any dropout, as modules or in numbers of its config."""
    config = getattr(model, "config", None)
    numbers = [value for name, value in getattr(config, "__dict__", {}).items() if "drop" in name]
    modules = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    return any(isinstance(value, float) and value > 0 for value in (*numbers, *modules))
