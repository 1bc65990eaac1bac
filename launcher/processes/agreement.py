"""Let all processes of a run fail, stop or go on together."""

from collections.abc import Callable
from typing import TypeVar, overload

from .signals import StopAsked
from .topology import Topology

T = TypeVar("T")


def by_main(topology: Topology, task: Callable[[], T]) -> T:
    """Return on every process what `task` returned on the main process; see `agreed` for its errors."""
    shared: T = topology.broadcast(agreed(topology, task if topology.is_main else None))
    return shared


@overload
def agreed(topology: Topology, task: Callable[[], T]) -> T: ...
@overload
def agreed(topology: Topology, task: Callable[[], T] | None) -> T | None: ...
def agreed(topology: Topology, task: Callable[[], T] | None) -> T | None:
    """Return the result of this process's task, None without one. All processes come here, and one failure ends them all.

    The task must not wait for other processes. Of the processes whose task fails, whatever the error, the first raises it,
    so that it is said once; all others raise SystemExit. A task that was told to stop raises StopAsked on all processes.
    """
    result: T | None = None
    error: Exception | StopAsked | None = None
    try:
        result = None if task is None else task()
    except (Exception, StopAsked) as caught:  # a fault of ours too: the others would wait for this process for ever
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
