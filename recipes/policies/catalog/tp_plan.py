"""Policies out of the tensor-parallel plans that configs of transformers carry."""

import copyreg
from abc import ABCMeta
from typing import Any

from torch import nn

from ....kernels.errors import UserError
from .layer import Layer

_STYLES = {
    "colwise": "column",
    "packed_colwise": "column",
    "rowwise": "row",
    "replicated_with_grad_allreduce": "shared",
}


class PolicyOfPlan(ABCMeta):
    """The class of policies made here. They are pickled as base and config, so that processes can be sent them."""

    base: type
    config: Any


def policy_of_plan(base: type, config: Any) -> Any:
    """Return a subclass of `base`, which is `Policy`; see `Policy.from_tp_plan`."""
    name = type(config).__name__
    plan: dict[str, str] | None = getattr(config, "base_model_tp_plan", None)
    if not plan:
        raise UserError(f"{name} carries no base_model_tp_plan; write a policy (docs/huggingface.md shows how)")
    unknown = sorted({style for style in plan.values() if style not in _STYLES})
    stacks = {path.split(".*.")[0] for path in plan}
    if unknown or len(stacks) != 1 or not all(".*." in path for path in plan):
        raise UserError(
            f"the plan of {name} has styles {', '.join(unknown) or 'outside one list of layers'}; a policy can be made of "
            f"{', '.join(_STYLES)} on the layers of one list"
        )
    rules: dict[str, list[Layer]] = {rule: [] for rule in ("attn_qkv", "attn_out", "mlp_in", "mlp_out")}
    shared = []
    for path, style in plan.items():
        own = path.split(".*.")[1]
        kind = _STYLES[style]
        if kind == "shared":
            shared.append(f"{own}.weight")
            continue
        attention = "attn" in own or "attention" in own
        rule = {"column": ("mlp_in", "attn_qkv"), "row": ("mlp_out", "attn_out")}[kind][attention]
        n_fused = 2 if style == "packed_colwise" else None
        rules[rule].append(Layer(f"{own}.weight", f"{own}.bias", n_fused=n_fused))
    methods: dict[str, Any] = {rule: staticmethod(lambda layers=layers: list(layers)) for rule, layers in rules.items()}
    methods["shared_by_heads"] = staticmethod(lambda: list(shared))
    methods["original_layer_class"] = staticmethod(lambda: _layer_class(config, *stacks))
    return PolicyOfPlan(f"{name.removesuffix('Config')}PlanPolicy", (base,), methods | {"base": base, "config": config})


def _reduce(policy: Any) -> tuple[Any, tuple[type, Any]]:
    return policy_of_plan, (policy.base, policy.config)


copyreg.pickle(PolicyOfPlan, _reduce)


def _layer_class(config: Any, stack: str) -> type[nn.Module]:
    """The class of the layers in the list at `stack` of the base model."""
    import torch
    from transformers import AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(config)
    return type(model.get_submodule(stack)[0])
