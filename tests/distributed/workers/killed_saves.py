"""Saves of the tiny network by processes that die at each call to the file system in turn.

The processes that die are forks, and a fork copies the tables of all that its parent has mapped: a process that ran many tests
may be refused a fork for want of memory. So the parent is a process of its own.
"""

import itertools
import os
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.checkpoints import list_ids, save
from helpers.spawn import PATIENCE_S
from helpers.tiny import MODEL, tiny_engine, train

from xformer_train.launcher.checkpoint import loading, saving, store
from xformer_train.launcher.config.schema import CheckpointConfig
from xformer_train.launcher.processes.durable_files import DurableFile
from xformer_train.launcher.processes.topology import Topology, quiet, start_processes, stop_processes

STEP = {"step": 3, "model": MODEL}


def killed_saves_worker(folder: Path) -> list[tuple[tuple[str, ...], str | None]]:
    """Return (ids, latest) as each process left them: the first died at its first call, the last at none.

    There are two checkpoints, and the save is a third that removes them. After every fourth death the run goes on.
    """
    quiet(debug=False)
    warnings.filterwarnings("ignore", ".*multi-threaded", DeprecationWarning)  # of fork: the child uses no other thread
    topology = start_processes(PATIENCE_S)
    engine = tiny_engine(topology, 0, "fp32")
    train(engine, topology, 0, 1)
    before = folder / "before"
    save(engine, before, "a", 1, topology)
    save(engine, before, "b", 2, topology)
    endings = []
    for call in itertools.count(1):
        checkpoints = folder / str(call)
        shutil.copytree(before, checkpoints)
        status = _save_in_a_fork(engine, checkpoints, topology, call)
        ids, latest = list_ids(checkpoints), store.latest_id(checkpoints)
        assert ids and latest in ids, call
        assert all(store.problems_of(checkpoints / name) == [] for name in ids), call
        endings.append((tuple(ids), latest))
        if call % 4 == 0:
            loading.load(engine, checkpoints / ids[-1], MODEL, topology)
            with _saver(engine, checkpoints, topology) as saver:
                saver.save("d", {"step": 4, "model": MODEL}, {})
            assert sorted(path.name for path in checkpoints.iterdir()) == ["d", "latest"]
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    stop_processes()
    return endings


def _saver(engine: Any, folder: Path, topology: Topology) -> saving.CheckpointSaver:
    return saving.CheckpointSaver(engine, folder, topology, CheckpointConfig(keep_last=1, asynchronous=True))


def _save_in_a_fork(engine: Any, folder: Path, topology: Topology, call: int) -> int:
    """Return the status of a process that saves checkpoint c and dies before the given call to the file system."""
    saver = _saver(engine, folder, topology)
    job = saver._capture("c", STEP, {"config.yaml": "name: run\n"})  # threads of gloo do not fork
    child = os.fork()
    if child == 0:
        try:
            _die_at(call)
            saver._run(job, 0.0)
            os._exit(0)
        finally:
            os._exit(1)  # not back into the test
    return os.waitpid(child, 0)[1]


def _die_at(call: int) -> None:
    """Kill this process by SIGKILL just before the given call to the file system, counted from 1."""
    count, writes = itertools.count(1), itertools.count(1)

    def dying(function: Callable[..., Any], counts: Callable[[], bool] = lambda: True) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if counts() and next(count) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return counted

    for owner, name in (
        *((Path, name) for name in ("mkdir", "rename", "replace", "unlink", "open")),
        (os, "fsync"),
        (shutil, "rmtree"),
    ):
        setattr(owner, name, dying(getattr(owner, name)))
    # torch writes in small pieces
    DurableFile.write = dying(DurableFile.write, lambda: next(writes) % 16 == 0)  # type: ignore[method-assign]
