"""What the first pass of a recomputed function got from outside, for the passes in backward that compute it again.

All of it is per thread. A recomputation runs in the thread of its backward pass, which need not be that of the first pass.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch.autograd import Variable

T = TypeVar("T")


class Replay:
    """Hold the values that `remembered` gave in one first pass, by key in order."""

    def __init__(self) -> None:
        self._first = _First()

    def first(self) -> AbstractContextManager[None]:
        """Enclose the first pass. If that repeats a pass of an outer recomputation, the values are those of the outer one."""
        self._first.without_grad = not torch.is_grad_enabled()
        return _under_way(self._first)

    def again(self) -> AbstractContextManager[None]:
        """Enclose a recomputation. There may be several, and each may stop early."""
        return _under_way(_Again({key: iter(values) for key, values in self._first.items()}))


class _First(dict[object, list[Any]]):
    """What a first pass got. without_grad: a reentrant checkpoint runs the pass without gradients, though they will follow."""

    without_grad = False


class _Again(dict[object, Iterator[Any]]):
    """What a recomputation has not asked for yet."""


class _Thread(threading.local):
    """passes: under way, innermost last. waiting: callbacks of nested backward passes, innermost last."""

    def __init__(self) -> None:
        self.passes: list[_First | _Again] = []
        self.waiting: list[list[Callable[[], None]]] = []


_THREAD = _Thread()


@contextmanager
def _under_way(this: _First | _Again) -> Iterator[None]:
    _THREAD.passes.append(this)
    try:
        yield
    finally:
        _THREAD.passes.pop()


def remembered(key: object, make: Callable[[], T]) -> T:
    """Return make(), or in a recomputation what the first pass got from its make().

    Raises RuntimeError where a recomputation asks more often than its first pass did.
    """
    firsts: list[_First] = []
    for under_way in reversed(_THREAD.passes):
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
    """Return whether what is computed now can have a backward pass, its own or that of a recomputation."""
    return torch.is_grad_enabled() or any(isinstance(p, _First) and p.without_grad for p in _THREAD.passes)


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Run callback when the backward pass that is running ends, the outermost one where several are nested."""
    if _THREAD.waiting:
        _THREAD.waiting[-1].append(callback)
    else:
        Variable._execution_engine.queue_callback(callback)


@contextmanager
def nested_backward() -> Iterator[None]:
    """Enclose a backward pass that the backward of an autograd function starts: its end is not the end of the whole."""
    _THREAD.waiting.append([])
    try:
        yield
    finally:
        for callback in _THREAD.waiting.pop():
            at_end_of_backward(callback)
