"""Let all processes of a run fail, stop or go on together."""

from collections.abc import Callable
from typing import TypeVar

from .signals import StopAsked
from .topology import Topology

T = TypeVar("T")


def by_main(topology: Topology, task: Callable[[], T]) -> T:
    """What `task` returned on the main process, on every process; see `agreed` for its errors."""
    result = agreed(topology, task if topology.is_main else None)
    shared: T = topology.broadcast(result)
    return shared


def agreed(topology: Topology, task: Callable[[], T] | None) -> T | None:
    """The result of this process's task, if it has one; all processes come here, and a failure of one ends them all.

    The first process to fail raises its error, the others leave without a word, so that it is said once. A task that was told
    to stop raises StopAsked on all.
    """
    result: T | None = None
    error: ValueError | OSError | StopAsked | None = None
    try:
        result = None if task is None else task()
    except (ValueError, OSError, StopAsked) as caught:
        error = caught
    topology.meet()  # a task may take longer than any collective waits
    failures = topology.gather(None if error is None else type(error) is StopAsked)
    if True in failures:
        raise StopAsked
    if error is not None and failures.index(False) == topology.rank:
        raise error
    if False in failures:
        raise SystemExit(1)
    return result
