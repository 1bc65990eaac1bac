"""Weight gradients that go to a buffer of the trainer, `weight.main_grad`, in place of `.grad`."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def into_main_grad(weight: Tensor, main_grad: Tensor, *, overwrite: bool) -> Tensor:
    """Return the weight itself; backward adds its gradient to main_grad, or puts it there if overwrite.

    main_grad: of the weight's shape and any float dtype, usually fp32. What the weight itself gets: see `add_to_main_grad`.
    """
    return _IntoMainGrad.apply(weight, main_grad, overwrite)  # type: ignore[no-any-return, no-untyped-call]


def main_grad_of(weight: Tensor) -> Tensor | None:
    """Return weight.main_grad; None where there is none, so that autograd hands the gradient to weight.grad.

    Raises ValueError for a shape other than the weight's, and where a hook waits for the gradient in `.grad`, as those of
    DeepSpeed's ZeRO stages 1 to 3 do: they would never run, and the weight would stay as it is.
    """
    main_grad: Tensor | None = getattr(weight, "main_grad", None)
    if main_grad is None:
        return None
    shape = tuple(weight.shape)
    if main_grad.shape != weight.shape:
        raise ValueError(
            f"main_grad of a weight of shape {shape} is {tuple(main_grad.shape)}; the shapes must be equal"
        )
    if weight._post_accumulate_grad_hooks and not hasattr(weight, "grad_added_to_main_grad"):
        raise ValueError(
            f"main_grad of a weight of shape {shape} would take its gradient from a hook that waits for it in .grad, as "
            f"DeepSpeed's ZeRO does; delete weight.main_grad, or remove the hook"
        )
    return main_grad


def add_to_main_grad(weight: Tensor, main_grad: Tensor, dweight: Tensor, *, overwrite: bool) -> Tensor | None:
    """Add dweight to main_grad, or write it there if overwrite, and return what autograd hands the weight in its place.

    That is None, so `.grad` stays None and hooks on the weight stay silent; but zeros for a weight with the attribute
    `grad_added_to_main_grad`, which becomes True: Megatron's hooks wait for a gradient, and look there whether to add it.
    """
    if overwrite:
        main_grad.copy_(dweight)
    else:
        main_grad.add_(dweight)
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    return torch.zeros_like(weight)


class _IntoMainGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, main_grad: Tensor, overwrite: bool) -> Tensor:
        ctx.main_grad = main_grad  # not saved: the backward of another micro-batch may change it before this one's
        ctx.weight, ctx.overwrite = weight, overwrite
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dweight: Tensor) -> tuple[Tensor | None, ...]:
        return add_to_main_grad(ctx.weight, ctx.main_grad, dweight, overwrite=ctx.overwrite), None, None
