"""Build items in a thread while the consumer works on earlier ones."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count, islice
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def prefetch(build: Callable[[int], T], start: int, stop: int | None, depth: int = 2) -> Iterator[Iterator[T]]:
    """Give an iterator over build(start), ..., build(stop - 1), in order, at most `depth` items ahead of the consumer.

    Without a stop it goes on for as long as it is asked.
    One thread runs `build`. An exception in it is raised by `next`, after the items before it. Leaving the `with` block, at
    the end or early, waits for the item under construction and ends the thread.
    """
    indices = count(start) if stop is None else iter(range(start, stop))
    loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
    ahead: deque[Future[T]] = deque(loader.submit(build, index) for index in islice(indices, depth))

    def items() -> Iterator[T]:
        while ahead:
            item = ahead.popleft().result()
            ahead.extend(loader.submit(build, index) for index in islice(indices, 1))
            yield item

    try:
        yield items()
    finally:
        loader.shutdown(cancel_futures=True)
