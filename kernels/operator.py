"""Functions of tensors as operators of `torch.library`, so that torch.compile takes each as one node of its graph."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
_LIBRARY = torch.library.Library("xformer_train", "FRAGMENT")


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes the decorated function torch.ops.xformer_train.<name>, which traces record in its place.

    schema: `name(Tensor x, float p) -> Tensor`, in torch's operator language; no result may share memory with an argument.
    fake: takes the same arguments and gives empty results of the right shape, dtype and device.
    Eager calls run the function itself: the dispatcher would add 10 us to each.
    """
    name = schema.partition("(")[0]

    def register(function: Callable[P, R]) -> Callable[P, R]:
        if not hasattr(torch.ops.xformer_train, name):  # a program may import this package under a second name
            _LIBRARY.define(schema)
            _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
            torch.library.register_fake(f"xformer_train::{name}", fake, lib=_LIBRARY)
        traced = getattr(torch.ops.xformer_train, name)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling():
                recorded: R = traced(*args, **kwargs)
                return recorded
            return function(*args, **kwargs)

        return call

    return register
