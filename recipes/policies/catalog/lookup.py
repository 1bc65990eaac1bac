"""The shipped policies of a model, found by the qualified names of its layers' classes: transformers is not imported."""

from collections.abc import Callable, Sequence

from torch import nn

from ....kernels.errors import UserError
from . import decoders, encoder_decoders, encoders, vision_speech
from .policy import Policy
from .shipped_policy import ShippedPolicy


def policies_for(model: nn.Module) -> list[type[Policy]]:
    """The policies of all classes of layers that the model has, in the order in which they appear.

    A class without a policy of its own takes that of the closest class that it is derived from. Raises ValueError if no module
    of the model has one.
    """
    found = {policy: None for module in model.modules() if (policy := _policy_of(type(module))) is not None}
    if not found:
        raise UserError(
            f"no policy is shipped for {type(model).__name__}; write one and give it as policy (docs/huggingface.md shows "
            f"how), or use one of these models: {shipped_models(lambda _: True)}"
        )
    return list(found)


def shipped_models(offers: Callable[[type[ShippedPolicy]], bool]) -> str:
    """Return the models of the shipped policies that `offers` something, in words."""
    return ", ".join(sorted({policy.layer_class.split(".")[0] for policy in SHIPPED.values() if offers(policy)}))


def _policy_of(cls: type) -> type[Policy] | None:
    names = (f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__)
    return next((SHIPPED[name] for name in names if name in SHIPPED), None)


Policies = type[Policy] | Sequence[type[Policy]] | None


def resolve_policies(model: nn.Module, policy: Policies) -> list[type[Policy]]:
    """The policies given, or those shipped for the model. Raises ValueError if there are none, and for what is none."""
    if policy is None:
        return policies_for(model)
    policies = list(policy) if isinstance(policy, Sequence) else [policy]
    for one in policies:
        if not isinstance(one, type) or not issubclass(one, Policy):
            raise UserError(f"policy is {one!r}, not a class derived from xformer_train.recipes.policies.Policy")
        if not isinstance(one.original_layer_class(), type):
            raise UserError(f"{one.__name__} has no original_layer_class that returns the class of its layers; add one")
    return policies


SHIPPED: dict[str, type[ShippedPolicy]] = {
    f"transformers.models.{policy.layer_class}": policy
    for module in (encoders, decoders, encoder_decoders, vision_speech)
    for policy in vars(module).values()
    if isinstance(policy, type) and issubclass(policy, ShippedPolicy) and policy is not ShippedPolicy
}
