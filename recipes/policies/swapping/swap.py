"""Fused layers in the place of a transformers model's own, and back.

The model object, its layers as objects and all that is not a layer stay. A layer's class becomes a subclass of its own, its
modules are replaced by one fused layer, and its parameters are moved there: what is stored alike is the same nn.Parameter,
projections to queries, keys and values are joined, and matrices that are stored (in, out) are transposed.
"""

from typing import Any

from torch import nn

from ....kernels.errors import UserError
from ....kernels.parallel.sharding import partitions_of
from ..catalog.lookup import Policies, resolve_policies
from .fused_layer import FusedLayer, MovedModule, Swapped, fused_class, set_parameter, stock_parameters
from .plan import SwapPlace, plan_swap


def swap(model: nn.Module, policy: Policies = None) -> int:
    """Puts our fused layer into the model, in place: Triton kernels on a GPU, PyTorch on a CPU. Returns the number of layers.

    policy: one, or one for each class of layers; None: those shipped for the model. They must `describe` the layers.

    Call signatures, hooks of the layers, hidden states, gradient checkpointing, generation and the names and shapes of
    `state_dict()` stay, and so `save_pretrained` writes what stock transformers reads. `named_parameters()` has the fused
    layers' names. Call it before optimizers or DeepSpeed engines are made. Under torch.autocast a layer computes in its dtype
    throughout.

    A model that `shard` sliced is swapped in shards; call it on every process of the group.

    Raises ValueError for a model without a policy, for one that is swapped already or sharded with sequence_parallel, and one
    for all that the fused layer cannot take over or honour; the model is then as it was. output_attentions raises one at the
    call.
    """
    places = plan_swap(model, resolve_policies(model, policy))
    for place in places:
        _swap_layer(place)
    names = [place.name for place in places]
    for name, module in model.named_modules():
        encloses = any(other.startswith(f"{name}." if name else "") for other in names)
        if encloses and not isinstance(module, FusedLayer) and hasattr(module, "config"):
            handle = module.register_forward_pre_hook(_refuse_attentions, with_kwargs=True)
            vars(module)["_swap_handle"] = handle
    return len(places)


def revert(model: nn.Module) -> int:
    """Undoes `swap`, bit for bit but for what training changed. Returns the number of layers.

    Classes, names, shapes and the order of parameters are as before. Gradients are moved too; make optimizers anew.
    Raises ValueError for a model that is not swapped, for parameters that DeepSpeed's ZeRO stage 3 has partitioned, and for
    adapters and other changes on modules of a fused layer.
    """
    layers = [module for module in model.modules() if isinstance(module, FusedLayer)]
    if not layers:
        raise UserError(f"this {type(model).__name__} is not swapped; there is nothing to revert")
    if any(hasattr(parameter, "ds_id") for layer in layers for parameter in layer.parameters()):
        raise UserError(
            f"DeepSpeed's ZeRO stage 3 has partitioned this {type(model).__name__}; load its gathered weights into a model "
            f"that is not, and revert that"
        )
    for layer in layers:
        own = {name for name, _ in layer.fused.named_parameters()}
        if own ^ layer.swapped.origins.keys():
            raise UserError(
                f"the fused layers of this {type(model).__name__} hold {sorted(own ^ layer.swapped.origins.keys())[0]}: "
                f"adapters, pruning or parametrizations changed their parameters; remove or merge them before revert(model)"
            )
    for layer in layers:
        _revert_layer(layer)
    for module in model.modules():
        handle = vars(module).pop("_swap_handle", None)
        if handle is not None:
            handle.remove()
        _forget_capture_hooks(module)
    return len(layers)


def _swap_layer(place: SwapPlace) -> None:
    layer: Any = place.module
    fused = place.build(layer).train(layer.training)
    names, partitions = [name for name, _ in layer.named_parameters()], partitions_of(layer)
    for name in names:
        set_parameter(layer, name, None)
    rotary, kept = place.description.rotary, (place.masks, place.layer_idx)
    swapped = Swapped(dict(layer._modules), names, place.origins, partitions, *kept, rotary, place.window)
    layer._modules.clear()
    stock: Any = type(layer)
    layer.__class__ = fused_class(stock)
    layer.fused, layer.swapped = fused, swapped
    for name in swapped.children:
        vars(layer)[name] = MovedModule(name)


def _revert_layer(layer: Any) -> None:
    swapped, fused = layer.swapped, layer.fused
    for name in swapped.children:
        del vars(layer)[name]
    del layer.swapped, layer.fused
    layer.__class__ = type(layer).__mro__[2]
    layer._modules.update(swapped.children)
    for name, parameter in stock_parameters(fused, swapped).items():
        set_parameter(layer, name, parameter)
    for child in swapped.children.values():
        child.train(layer.training)


def _refuse_attentions(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    asked = kwargs.get("output_attentions")
    if asked or (asked is None and getattr(module.config, "output_attentions", False)):
        raise UserError(
            "output_attentions=True: fused layers keep no attention probabilities; leave it out, or call revert(model) first"
        )


def _forget_capture_hooks(module: nn.Module) -> None:
    """Lets transformers install the hooks that collect outputs once more: those of modules that were away are missing."""
    for key, hook in list(module._forward_hooks.items()):
        if getattr(hook, "__module__", "") == "transformers.utils.output_capturing":
            del module._forward_hooks[key]
    if vars(module).get("_output_capturing_hooks_installed"):
        module._output_capturing_hooks_installed = False  # type: ignore[assignment]
