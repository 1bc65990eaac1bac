import threading

import pytest

from xformer_train.recipes.data.prefetch import prefetch


def loaders():
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_items_come_in_order():
    with prefetch(lambda index: index * index, 3, 10) as items:
        assert len(loaders()) == 1
        assert list(items) == [index * index for index in range(3, 10)]
    assert not loaders()


def test_an_empty_range_gives_nothing():
    with prefetch(lambda index: index, 4, 4) as items:
        assert list(items) == []


def test_an_exception_surfaces_after_the_items_before_it():
    def build(index):
        if index == 2:
            raise ValueError("line 3 is broken")
        return index

    seen = []
    with pytest.raises(ValueError, match="line 3 is broken"), prefetch(build, 0, 5) as items:
        for item in items:
            seen.append(item)
    assert seen == [0, 1]
    assert not loaders()


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_no_more_than_depth_items_are_built_ahead(depth):
    built, room = [], threading.Semaphore(0)

    def build(index):
        built.append(index)
        room.release()
        return index

    with prefetch(build, 0, 100, depth) as items:
        for _ in range(depth):
            room.acquire()
        assert not room.acquire(timeout=0.05)
        assert next(items) == 0
        room.acquire()
        assert not room.acquire(timeout=0.05)
        assert len(built) == depth + 1


def test_a_consumer_that_stops_early_leaves_no_thread_behind():
    with prefetch(lambda index: index, 0, 10**9) as items:
        assert next(items) == 0
    assert not loaders()


def test_a_consumer_that_fails_gets_its_own_error_and_leaves_no_thread_behind():
    with pytest.raises(RuntimeError, match="step"), prefetch(lambda index: index, 0, 10**9) as items:
        for _ in items:
            raise RuntimeError("step")
    assert not loaders()


def test_building_runs_while_the_consumer_works():
    second = threading.Event()

    def build(index):
        if index == 1:
            second.set()
        return index

    with prefetch(build, 0, 2) as items:
        next(items)
        assert second.wait(timeout=60)
