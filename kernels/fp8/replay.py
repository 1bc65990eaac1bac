"""What the first pass of a recomputed function got from outside, for the passes in backward that compute it again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.autograd import Variable

T = TypeVar("T")


class Replay:
    """The values that `remembered` gave in one first pass, by key in order."""

    def __init__(self) -> None:
        self._first = _First()

    @contextmanager
    def first(self) -> Iterator[None]:
        """Around the first pass. In one that repeats another, itself recomputed, the values are those of the other."""
        self._first.without_grad = not torch.is_grad_enabled()
        _PASSES.append(self._first)
        try:
            yield
        finally:
            _PASSES.pop()

    @contextmanager
    def again(self) -> Iterator[None]:
        """Around a recomputation, of which there may be several, and which may stop early."""
        _PASSES.append(_Again({key: iter(values) for key, values in self._first.items()}))
        try:
            yield
        finally:
            _PASSES.pop()


class _First(dict[object, list[Any]]):
    """What a first pass got. without_grad: its checkpoint is reentrant and runs it so, though there will be gradients."""

    without_grad = False


class _Again(dict[object, Iterator[Any]]):
    """What a recomputation under way has still to ask for."""


_PASSES: list[_First | _Again] = []  # under way, innermost last


def remembered(key: object, make: Callable[[], T]) -> T:
    """make(), or in a recomputation what the first pass got in its place.

    Raises RuntimeError where a recomputation asks for more than its first pass did.
    """
    firsts: list[_First] = []
    for under_way in reversed(_PASSES):
        if isinstance(under_way, _Again):
            value = _next(under_way, key)
            break
        firsts.append(under_way)
    else:
        value = make()
    for values in firsts:
        values.setdefault(key, []).append(value)
    return value


def _next(again: _Again, key: object) -> Any:
    try:
        return next(again[key])
    except (KeyError, StopIteration):
        raise RuntimeError(
            "a recomputation calls a layer that its first pass did not call, or calls it more often; the function must do the "
            "same in both"
        ) from None


def will_have_gradients() -> bool:
    """Whether what is computed now can have a backward pass, be it that of a recomputation."""
    return torch.is_grad_enabled() or any(isinstance(p, _First) and p.without_grad for p in _PASSES)


_WAITING: list[list[Callable[[], None]]] = []  # callbacks of nested backward passes, innermost last


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Runs callback at the end of the backward pass that is running, the outermost one."""
    if _WAITING:
        _WAITING[-1].append(callback)
    else:
        Variable._execution_engine.queue_callback(callback)


@contextmanager
def nested_backward() -> Iterator[None]:
    """Around a backward pass that an autograd function starts in its own: the end of that is not the end of the whole."""
    _WAITING.append([])
    try:
        yield
    finally:
        for callback in _WAITING.pop():
            at_end_of_backward(callback)
