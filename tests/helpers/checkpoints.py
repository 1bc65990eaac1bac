"""Checkpoints for tests: made from the tiny engine, made of nothing, changed, damaged."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from helpers.tiny import MODEL

from xformer_train.launcher.checkpoint.saving import CheckpointSaver
from xformer_train.launcher.checkpoint.store import entries, sealed
from xformer_train.launcher.config.schema import CheckpointConfig
from xformer_train.launcher.processes.durable_files import read_record


def save(
    engine: Any, folder: Path, checkpoint_id: str, step: int, topology: Any, extra_files: Any = None, **state: Any
) -> None:
    """A checkpoint of the tiny model, which is there when this returns."""
    with CheckpointSaver(engine, folder, topology, CheckpointConfig(keep_last=None, asynchronous=False)) as saver:
        saver.save(checkpoint_id, {"step": step, "model": MODEL, **state}, extra_files or {})


def bare_checkpoint(folder: Path, checkpoint_id: str, step: int, files: Mapping[str, str] | None = None) -> Path:
    """A checkpoint of files of text, whole in every way but that no engine can load it."""
    path = folder / checkpoint_id
    path.mkdir(parents=True)
    for name, text in (files or {}).items():
        (path / name).write_text(text)
    facts = {"zero_stage": 0, "world_size": 1, "tensor_parallel": 1, "precision": "fp32"}
    records = {name: read_record(path / name)._asdict() for name in files or {}}
    state = {"step": step, "samples": 8 * step, "model": MODEL, "engine": facts, "partitions": {}, "files": records}
    state["saved_at"] = "2026-11-21T12:00:00+00:00"
    (path / "state.json").write_text(sealed(state))
    return path


def list_ids(folder: Path) -> list[str]:
    """The ids of the checkpoints in a folder that can be read, by rising step."""
    return [entry.id for entry in entries(folder) if entry.state is not None]


@contextlib.contextmanager
def changed_state(checkpoint: Path) -> Iterator[dict[str, Any]]:
    """The contents of state.json, to be changed; sealed anew afterwards, with the files as they are then."""
    state = json.loads((checkpoint / "state.json").read_text())
    del state["sha256"]
    yield state
    state["files"] = {name: read_record(checkpoint / name)._asdict() for name in state["files"]}
    (checkpoint / "state.json").write_text(sealed(state))


def flip_byte(path: Path, position: int | None = None) -> None:
    """Changes one byte, in the middle if no position is given."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 0x10
    path.write_bytes(content)
