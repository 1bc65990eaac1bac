"""Functions of tensors as operators of `torch.library`, so that torch.compile takes each as one node of its graph."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
_LIBRARY = torch.library.Library("xformer_train", "FRAGMENT")


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make the decorated function torch.ops.xformer_train.<name>, which traces record in its place.

    schema: `name(Tensor x, float p) -> Tensor`, in torch's operator language; no result may share memory with an argument.
    fake: takes the same arguments and gives empty results of the right shape, dtype and device.
    Eager calls run the function itself: the dispatcher would add 10 us to each. On a GPU that is the device of the first tensor
    meanwhile. Exports run it too, as other programs know torch's own operators alone.
    """
    name = schema.partition("(")[0]

    def register(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            device = _other_device(args)
            if device is None:
                return function(*args, **kwargs)
            with torch.cuda.device(device):
                return function(*args, **kwargs)

        if not hasattr(torch.ops.xformer_train, name):  # a program may import this package under a second name
            _LIBRARY.define(schema)
            _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
            torch.library.register_fake(f"xformer_train::{name}", fake, lib=_LIBRARY)
        traced = getattr(torch.ops.xformer_train, name)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
                recorded: R = traced(*args, **kwargs)
                return recorded
            return run(*args, **kwargs)

        return call

    return register


def reshaped(x: Tensor, *shape: int) -> Tensor:
    """Return a fresh tensor in another shape, for an autograd function to return: nobody could change a view in place."""
    if torch.compiler.is_compiling():
        viewed: Tensor = torch.ops.aten._unsafe_view(x, shape)
        return viewed
    return x.view(shape).data  # the same, 2 us earlier


def reused(x: Tensor) -> Tensor | None:
    """Return the memory for a result that takes the place of x; None in an export, whose graph torch may differentiate."""
    return None if torch.compiler.is_exporting() else x


def _other_device(args: Iterable[object]) -> torch.device | None:
    """Return the GPU of the first tensor, if it is not the current one, on which Triton launches kernels."""
    for arg in args:  # a loop, which costs every call of an operator half of what a generator does
        if isinstance(arg, Tensor):
            return arg.device if arg.is_cuda and arg.get_device() != torch.cuda.current_device() else None
    return None
