"""The precision regions that are open in this thread: `with` statements inside which layers compute products differently.

The only kind is opened by fp8_autocast of kernels/fp8/scaling.py. Layers ask here, so that outside they need no file of FP8.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Thread(threading.local):
    def __init__(self) -> None:
        self.regions: tuple[
            Any, ...
        ] = ()  # of the instance, because torch.compile takes that of a class for a constant


_THREAD = _Thread()


def open_regions() -> tuple[Any, ...]:
    """Return the regions that this thread has opened and not yet left, innermost last."""
    return _THREAD.regions


def active_region() -> Any | None:
    """Return the innermost open region of this thread, None outside of any."""
    return _THREAD.regions[-1] if _THREAD.regions else None


@contextmanager
def in_regions(regions: tuple[Any, ...]) -> Iterator[None]:
    """Make these the open regions of this thread, and no others."""
    outside = _THREAD.regions
    _THREAD.regions = regions
    try:
        yield
    finally:
        _THREAD.regions = outside
