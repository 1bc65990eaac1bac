"""Modules whose parameters an op reads: where one computes more than its parameters say, it is called in place of that."""

from typing import Any

from torch import nn


def must_be_called(module: Any, plain: type[nn.Module]) -> bool:
    """Return whether a module does more than a `plain` one of its parameters, so that an op must not read them in its place.

    It does where its forward is not that of `plain`, as an adapter's, and where hooks stand on it, as those of pruning, weight
    norm or FSDP. A parametrized module does not: its parameters are read in each pass, and are what the parametrization makes.
    DeepSpeed's hooks do not count: ZeRO stage 3 has them on every module, and gathers a parameter where it is read, too.
    """
    if type(module).forward is not plain.forward or "forward" in vars(module):
        return True
    return has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Return whether hooks other than DeepSpeed's stand on a module. It is asked in every pass, and costs a quarter of a us."""
    if not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks):
        return False
    kinds = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    hooks = [hook for kind in kinds for hook in kind.values()]
    return not all((getattr(hook, "__module__", None) or "").startswith("deepspeed.") for hook in hooks)
