"""The policies of a model, found by the qualified names of its layers' classes: transformers is not imported."""

from collections.abc import Callable, Sequence

from torch import nn

from ....kernels.errors import UserError
from .models import FAMILIES
from .policy import Policy
from .shipped_policy import Family, ShippedPolicy

Policies = type[Policy] | Sequence[type[Policy]] | None


def policies_for(model: nn.Module) -> list[type[Policy]]:
    """The policies of all classes of layers that the model has, in the order in which they appear.

    A class without a policy of its own takes that of the closest class that it is derived from. Where none is shipped, it is
    the one that the model's config carries as its tensor-parallel plan. Raises ValueError if there is none.
    """
    found = {policy: None for module in model.modules() if (policy := _policy_of(type(module))) is not None}
    config = getattr(model, "config", None)
    if not found and getattr(config, "base_model_tp_plan", None):
        return [Policy.from_tp_plan(config)]
    if not found:
        raise UserError(
            f"no policy is shipped for {type(model).__name__}; write one and give it as policy (docs/huggingface.md shows "
            f"how), or use one of these models: {shipped_models(bool)}"
        )
    return list(found)


def shipped_models(offers: Callable[[Family], object]) -> str:
    """Return the models of the families that `offers` something, in words."""
    return ", ".join(sorted({name.split(".")[2] for name, policy in SHIPPED.items() if offers(policy.family)}))


def _policy_of(cls: type) -> type[Policy] | None:
    names = (f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__)
    return next((SHIPPED[name] for name in names if name in SHIPPED), None)


def resolve_policies(model: nn.Module, policy: Policies) -> list[type[Policy]]:
    """The policies given, or those of the model. Raises ValueError if there are none, and for what is none."""
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
    layer_class: policy for family in FAMILIES for layer_class, policy in family.policies().items()
}
