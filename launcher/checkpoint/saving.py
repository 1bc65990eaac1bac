"""Save checkpoints: copy the state, write it in a thread beside training, read it back, and only then give it its id.

Every process writes its own files into `.ID.tmp`; after each phase all agree whether it failed anywhere. The main process
writes state.json last, renames the folder and moves `latest`. A crash at any point leaves the checkpoints from before.
"""

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ...kernels.errors import RefusedError
from ..config.schema import CheckpointConfig
from ..processes import console
from ..processes.agreement import by_main
from ..processes.durable_files import FileRecord, copy_into, flush_folder, flush_folders, read_record, write_text
from ..processes.topology import Topology
from ..processes.watchdog import LostProcessError
from . import store
from .files import file_access, random_state, write_file
from .host_copy import HostCopies
from .resharding import layout_record, loss_scaler_record, partitions_record
from .store import LATEST, NONE_YET, STATE

_LOG = logging.getLogger(__name__)
_LONGEST_SAVE = timedelta(days=1)  # a process that does not live is noticed by the watchdog, long before
_NOTICEABLE_S = 1.0  # a shorter wait for the save before stands in the log alone

Gather = Callable[[Any], list[Any]]


@dataclass(frozen=True)
class _Save:
    id: str
    state: dict[str, Any]
    """Of state.json, without `files`."""
    tensors: dict[str, Any]
    """By name of the file, what `write_file` is to write."""
    others: dict[str, Path | str]
    """By name in the checkpoint, a file or folder to copy, or the text itself."""
    problems: list[OSError] = field(default_factory=list)
    """What is wrong already."""


class CheckpointSaver:
    """Save the checkpoints of a run, one at a time, and remove those that `checkpoint.keep_last` leaves no room for.

    Every process makes one and uses it alike, as a context. A save that fails gives a warning on the console and in the log,
    and training goes on: what was written of it is removed, and earlier checkpoints stay as they are. Leaving the context waits
    for the save in progress, and raises OSError, on every process, if the last one failed.
    """

    def __init__(self, engine: Any, folder: Path, topology: Topology, config: CheckpointConfig) -> None:
        self._engine, self._folder, self._topology, self._config = engine, folder, topology, config
        self._copies = HostCopies() if config.asynchronous else None
        # The thread must not meet the collectives of training, and one may write for longer than those wait for another.
        alone = topology.world_size == 1
        self._group = None if alone else dist.new_group(backend="gloo", timeout=_LONGEST_SAVE)
        self._thread: threading.Thread | None = None
        self._failure: OSError | None = None
        self._crash: Exception | None = None
        self._begun_s = 0.0
        self.last_save_s = 0.0
        """How long the last complete save took, its writing beside training included; 0 before one."""

    def save(self, checkpoint_id: str, state: Mapping[str, Any], extra_files: Mapping[str, Path | str]) -> None:
        """Begin a save, after the one before has ended, and return when training may go on.

        state: JSON values that describe the run at this point; must hold `step` (int) and `model` (the model's config).
        extra_files: name in the checkpoint -> file or folder to copy, or the text itself as a str.
        Raises UserError if the id exists or cannot be a folder's name.
        """
        started_s = time.monotonic()
        self.wait()
        self._begun_s = time.monotonic()
        waited_s = self._begun_s - started_s
        if waited_s > _NOTICEABLE_S:
            waited = f"waited {waited_s:.1f} s for the save before it"
            self._tell(f"step {state['step']:,} {waited}; raise checkpoint.save_every_steps")
        by_main(self._topology, lambda: store.check_id(self._folder, checkpoint_id))
        self._failure = None
        job = self._capture(checkpoint_id, state, extra_files)
        if self._copies is None:
            self._run(job, started_s)
            self.wait()
            return
        text = "checkpoint %s: the step waited %.3f s, %.3f s of it for the save before"
        _LOG.info(text, checkpoint_id, time.monotonic() - started_s, waited_s)
        self._thread = threading.Thread(target=self._run, args=(job, time.monotonic()), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return when no save is in progress. Raise what a save met other than a refusal of the operating system."""
        self._join()
        if self._crash is not None:
            raise self._crash

    def __enter__(self) -> "CheckpointSaver":
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if kind is not None:  # that error is the one to tell of
            self._join()
            return
        self.wait()
        if self._failure is not None:
            raise self._failure

    def _capture(self, checkpoint_id: str, state: Mapping[str, Any], extra_files: Mapping[str, Path | str]) -> _Save:
        """Return what this process has to write: the state of training, or a copy where it is written beside training."""
        engine, topology, copies = self._engine, self._topology, self._copies
        tensors: dict[str, Any] = {}
        problems: list[OSError] = []
        if copies is not None:
            copies.begin()

        def take(state_dict: Any, name: str) -> None:
            # Not raised at once: DeepSpeed ends with a barrier, where the others would wait for a process that left early.
            try:
                tensors[name] = state_dict if copies is None else copies.copy(state_dict)
            except OSError as error:
                problems.append(error)

        with file_access(engine, save=take):
            engine.save_checkpoint(str(self._folder), tag=checkpoint_id, save_latest=False)
        if topology.tensor_rank == 0:  # the processes of a replica draw alike
            tensors[f"rng_replica{topology.replica}.pt"] = random_state(topology.device)
        others: dict[str, Path | str] = dict(extra_files) if topology.is_main else {}
        if topology.replica == 0 or engine.zero_optimization_stage() > 0:  # at stage 0 replicas hold the same
            others[f"layout_rank{topology.rank}.json"] = json.dumps(layout_record(engine)) + "\n"
        record = {
            **state,
            "engine": engine_facts(engine),
            "partitions": partitions_record(engine.module),
            "loss_scaler": loss_scaler_record(engine),
            "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        return _Save(checkpoint_id, record, tensors, others, problems)

    def _run(self, job: _Save, started_s: float) -> None:
        """Carry out one save, from the copy of the state to the removal of older checkpoints. No error leaves it."""
        try:
            _write(job, self._folder, self._topology.is_main, lambda value: self._topology.gather(value, self._group))
            self.last_save_s = time.monotonic() - self._begun_s
            _LOG.info("saved checkpoint %s: written and verified in %.3f s", job.id, time.monotonic() - started_s)
            if self._topology.is_main:
                self._prune(job.id)
        except LostProcessError as error:
            self._crash = error
        except OSError as error:
            self._failure = error
            self._tell(f"{error}; if steps are left, training goes on and the next save tries again")
        except Exception as error:
            _LOG.exception("checkpoint %s", job.id)
            self._crash = error

    def _prune(self, newest: str) -> None:
        if self._config.keep_last is None:
            return
        keep_every = self._config.keep_every_steps
        try:
            names = store.surplus(self._folder, self._config.keep_last, keep_every, verified_id=newest)
        except OSError as error:
            self._tell(str(error))
            return
        for name in names:
            try:
                store.remove(self._folder, name)
                _LOG.info("removed checkpoint %s", name)
            except OSError as error:
                self._tell(f"checkpoint {name}, for which checkpoint.keep_last leaves no room, is not removed: {error}")

    def _tell(self, text: str) -> None:
        console.warn(text, _LOG, shown=self._topology.is_main)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def engine_facts(engine: Any) -> dict[str, Any]:
    """Return what a checkpoint notes of the engine that it was made with."""
    import deepspeed

    precision = "fp16" if engine.fp16_enabled() else "bf16" if engine.bfloat16_enabled() else "fp32"
    return {
        "zero_stage": int(engine.zero_optimization_stage()),
        "world_size": int(engine.world_size),
        "tensor_parallel": int(engine.mp_world_size),
        "precision": precision,
        "deepspeed": deepspeed.__version__,
    }


def _write(job: _Save, folder: Path, is_main: bool, gather: Gather) -> None:
    """Make the checkpoint; called by all processes. gather: every process's value, in order of rank, on every process.

    Raises OSError on every process alike if the operating system refused something to one of them.
    """
    unfinished, pointer = folder / f".{job.id}.tmp", folder / f".{LATEST}.tmp"
    records: dict[str, FileRecord] = {}

    def begin() -> None:
        if job.problems:
            raise job.problems[0]
        if is_main:
            if not folder.is_dir():
                folder.mkdir(parents=True)
                flush_folder(folder.parent)
            for problem in store.remove_unfinished(folder):
                console.warn(problem, _LOG)
            if os.path.lexists(unfinished):  # it could not be removed, or somebody else made it
                unfinished.rename(store.free_name(folder, job.id))
            unfinished.mkdir()
            write_text(unfinished / STATE, "{}\n")  # by which leftovers are known

    def write() -> None:
        for name, value in job.tensors.items():
            records[name] = write_file(value, unfinished / name)
        for name, source in job.others.items():
            records.update(copy_into(source, unfinished, name))
        for name, record in records.items():
            if read_record(unfinished / name, from_disk=True) != record:
                raise OSError(f"{name} reads back otherwise than it was written; the disk may be failing")

    def finish() -> None:
        if not is_main:
            return
        files = {name: record._asdict() for each in everyones for name, record in each.items()}
        write_text(unfinished / STATE, store.sealed({**job.state, "files": dict(sorted(files.items()))}))
        # What a full disk could refuse comes before the renames, which need no space.
        write_text(pointer, job.id + "\n")
        flush_folders(unfinished)
        unfinished.rename(folder / job.id)
        flush_folder(folder)
        pointer.replace(folder / LATEST)
        (folder / NONE_YET).unlink(missing_ok=True)
        flush_folder(folder)

    everyones: list[dict[str, FileRecord]] = []
    for work in (begin, write, finish):
        problem = _problem_anywhere(work, gather)
        if problem is not None:
            if is_main and work is not begin:
                shutil.rmtree(unfinished, ignore_errors=True)
                pointer.unlink(missing_ok=True)
            remedy = "free space there or make it writable (earlier checkpoints are as they were)"
            raise RefusedError(f"checkpoint {job.id} could not be saved in {folder}: {problem}; {remedy}")
        if work is write:
            everyones = gather(records)


def _problem_anywhere(work: Callable[[], None], gather: Gather) -> str | None:
    """Run `work` on every process. Return what the operating system refused to one of them, None if nothing.

    Raises whatever else `work` raises, and LostProcessError on the other processes.
    """
    problem, crash = None, None
    try:
        work()
    except OSError as error:
        problem = error.strerror or str(error)
    except Exception as error:
        problem, crash = repr(error), error
    told = gather((problem, crash is not None))
    if crash is not None:
        raise crash
    crashed = [rank for rank, (_, has_crashed) in enumerate(told) if has_crashed]
    if crashed:
        raise LostProcessError(f"process {crashed[0]} failed in a save: {told[crashed[0]][0]}")
    return next((text for text, _ in told if text is not None), None)
