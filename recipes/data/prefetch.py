"""Background loading: items are built in a thread while the consumer works on earlier ones."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class _End:
    """The last thing in the queue: nothing more comes, because of `error` if there is one."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


@contextmanager
def prefetch(build: Callable[[int], T], start: int, stop: int, depth: int = 2) -> Iterator[Iterator[T]]:
    """An iterator over build(start), ..., build(stop - 1), in order, at most `depth` finished items ahead of the consumer.

    One thread runs `build`. An exception in it is raised by `next`, after the items before it. Leaving the `with` block, at
    the end or early, waits for the item under construction and ends the thread.
    """
    ready: queue.Queue[T | _End] = queue.Queue()
    free = threading.Semaphore(depth)
    closing = threading.Event()

    def work() -> None:
        error = None
        try:
            for index in range(start, stop):
                free.acquire()
                if closing.is_set():
                    return
                ready.put(build(index))
        except BaseException as caught:  # the consumer raises it: a thread has nobody else to tell
            error = caught
        ready.put(_End(error))

    def items() -> Iterator[T]:
        while True:
            item = ready.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            free.release()
            yield item

    thread = threading.Thread(target=work, name="loader", daemon=True)
    thread.start()
    try:
        yield items()
    finally:
        closing.set()
        free.release()
        thread.join()
