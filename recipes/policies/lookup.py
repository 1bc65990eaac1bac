"""The shipped policies of a model, found by the qualified names of its layers' classes: transformers is not imported."""

from torch import nn

from .policy import Policy
from .shipped import SHIPPED


def policies_for(model: nn.Module) -> list[type[Policy]]:
    """The policies of all classes of layers that the model has, in the order in which they appear.

    A class without a policy of its own takes that of the closest class that it is derived from. Raises ValueError if no module
    of the model has one.
    """
    found = {policy: None for module in model.modules() if (policy := _policy_of(type(module))) is not None}
    if not found:
        models = sorted({policy.layer_class.split(".")[0] for policy in SHIPPED.values()})
        raise ValueError(
            f"no policy is shipped for {type(model).__name__}; write one and give it as policy (docs/huggingface.md shows "
            f"how), or use one of these models: {', '.join(models)}"
        )
    return list(found)


def _policy_of(cls: type) -> type[Policy] | None:
    names = (f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__)
    return next((SHIPPED[name] for name in names if name in SHIPPED), None)
