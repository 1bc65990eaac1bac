"""Saves and resumes of the tiny network in several processes, one after the other: starting those takes longer than these."""

import sys
import threading
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from helpers.checkpoints import list_ids, save
from helpers.spawn import PATIENCE_S
from helpers.tiny import MODEL, tiny_engine, tiny_model, train, whole_weights

from xformer_train.launcher.checkpoint import loading, store
from xformer_train.launcher.checkpoint import saving as checkpoint_saving
from xformer_train.launcher.checkpoint.saving import CheckpointSaver
from xformer_train.launcher.config.schema import CheckpointConfig
from xformer_train.launcher.processes.topology import Topology, quiet, start_processes, stop_processes


def checkpoint_worker(folder: Path, stages: list[int]) -> dict[str, Any]:
    """Results of `_resume` by stage, of `_full_disk` and of `_beside_training`."""
    quiet(debug=False)
    topology = start_processes(PATIENCE_S)
    results = {stage: _resume(folder / str(stage), stage, topology) for stage in stages}
    full = _full_disk(folder / "full", topology)
    beside = _beside_training(folder / "beside", topology)
    stop_processes()
    return {"resume": results, "full disk": full, "beside training": beside}


def _resume(folder: Path, stage: int, topology: Topology) -> dict[str, Any]:
    """Four steps at a stretch, and with a checkpoint and a new engine between, each as (record, final weights); and the
    weights that `load_weights` reads from that checkpoint beside those it was made with."""
    straight = tiny_engine(topology, stage, "fp32")
    whole = (train(straight, topology, 0, 4), whole_weights(straight))

    before = tiny_engine(topology, stage, "fp32")
    record = train(before, topology, 0, 2)
    save(before, folder, "half", 2, topology)
    saved = whole_weights(before)

    after = tiny_engine(topology, stage, "fp32")
    torch.manual_seed(9)  # what load must undo
    assert loading.load(after, folder / "half", MODEL, topology)
    record += train(after, topology, 2, 4)

    module = tiny_model()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    loading.load_weights(module, folder / "half", MODEL, topology)
    return {
        "straight": whole,
        "resumed": (record, whole_weights(after)),
        "saved": (saved, [p.detach() for p in module.parameters()]),
    }


class FullDisk:
    """Within, one process has no room for its tensors."""

    def __init__(self, topology: Topology, rank: int) -> None:
        self._full = topology.rank == rank

    def __enter__(self) -> None:
        self._save = torch.save
        if self._full:
            torch.save = self._refuse

    def __exit__(self, *_: object) -> None:
        torch.save = self._save

    def _refuse(self, *args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")


def _full_disk(folder: Path, topology: Topology) -> list[str]:
    """Message of a save with a full disk on process 1; ids and files after it; ids after the same save with room for it."""
    engine = tiny_engine(topology, 1, "fp32")
    train(engine, topology, 0, 1)
    save(engine, folder, "first", 1, topology)
    message = "no error"
    with FullDisk(topology, 1):
        try:
            save(engine, folder, "second", 2, topology)
        except OSError as error:
            message = str(error)
    topology.barrier()
    seen = [
        message,
        ",".join(list_ids(folder)),
        ",".join(sorted(path.name for path in folder.iterdir())),
    ]
    topology.barrier()
    save(engine, folder, "second", 2, topology)
    return [*seen, ",".join(list_ids(folder))]


def _beside_training(folder: Path, topology: Topology) -> dict[str, Any]:
    """Five steps, one save after each of the first three beside the steps that follow, the second one with a full disk."""
    straight = tiny_engine(topology, 2, "fp32")
    engine = tiny_engine(topology, 2, "fp32")
    expected = train(straight, topology, 0, 5)
    torch.manual_seed(100 + topology.rank)
    record = train(engine, topology, 0, 1)
    told, sys.stderr = sys.stderr, StringIO()
    gate, write = threading.Event(), checkpoint_saving.write_file

    def wait_and_write(value: Any, path: Path) -> Any:
        gate.wait()
        return write(value, path)

    checkpoint_saving.write_file = wait_and_write
    try:
        with CheckpointSaver(engine, folder, topology, CheckpointConfig(keep_last=1)) as saver:
            saver.save("one", {"step": 1, "model": MODEL}, {})
            record += train(engine, topology, 1, 2)  # collectives of training, while the save is held up
            gate.set()
            saver.wait()
            with FullDisk(topology, 1):
                saver.save("two", {"step": 2, "model": MODEL}, {})
                record += train(engine, topology, 2, 3)
                saver.wait()
            topology.barrier()
            after_two = list_ids(folder)
            topology.barrier()
            saved = whole_weights(engine)
            saver.save("three", {"step": 3, "model": MODEL}, {})
            record += train(engine, topology, 3, 4)
    finally:
        checkpoint_saving.write_file = write
        warning, sys.stderr = sys.stderr.getvalue(), told
    problems = store.verify_together(folder / "three", topology)
    after = tiny_engine(topology, 2, "fp32")
    loading.load(after, folder / "three", MODEL, topology)
    return {
        "same": record == expected[:4],
        "after two": after_two,
        "in the end": list_ids(folder),
        "warning": warning,
        "problems": problems,
        "saved": (saved, whole_weights(after)),
        "resumed": train(after, topology, 3, 5) == expected[3:],
        "timeouts_s": [_timeout_s(engine, folder, topology, asynchronous) for asynchronous in (True, False)],
    }


def _timeout_s(engine: Any, folder: Path, topology: Topology, asynchronous: bool) -> float:
    """How long a saver waits for the other process."""
    saver = CheckpointSaver(engine, folder, topology, CheckpointConfig(asynchronous=asynchronous))
    timeout: timedelta = saver._group._get_backend(torch.device("cpu")).options._timeout
    return timeout.total_seconds()
