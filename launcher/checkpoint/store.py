"""Folders of checkpoints: what is there, what is whole, what is wanted, what may go. No torch, no tensors.

    checkpoints/step00000200/   one checkpoint: state.json and the files that it lists with their sizes and checksums
    checkpoints/latest          id of the newest complete checkpoint
    checkpoints/.none           there until the first save: without it, an empty folder has lost its checkpoints
    checkpoints/.ID.tmp/        a save or a removal in progress, or one that was interrupted
    checkpoints/ID.damaged1/    set aside by a run that resumed from an earlier one

docs/resume.md is the page for users.
"""

import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import string
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...kernels.errors import UserError, refused
from ..processes.durable_files import FileRecord, flush_folder, read_record, replace_text
from .state_types import is_ours

if TYPE_CHECKING:
    from ..processes.topology import Topology  # imports torch

LATEST = "latest"
STATE = "state.json"
NONE_YET = ".none"
_DAMAGED = ".damaged"
_SEAL = "sha256"
_WRITABLE = "free space there, or make it a folder that can be written"
_LONGEST_NAME = 255  # bytes, on nearly every file system
_REQUIRED = {"step", "model", "engine", "partitions", "saved_at", "files"}

# Files that `verify_together` has found as they were written, so that they are not read once more when they are loaded.
_verified: set[tuple[Any, ...]] = set()


class Entry(NamedTuple):
    """A checkpoint in a folder; `state` is None if `problem`, one clause, says why it cannot be read."""

    id: str
    state: dict[str, Any] | None
    problem: str


def sealed(state: Mapping[str, Any]) -> str:
    """Return the text of state.json: `state` in JSON and the checksum of that, so that no byte of it changes unnoticed."""
    digest = hashlib.sha256(json.dumps(state, indent=1).encode()).hexdigest()
    return json.dumps({**state, _SEAL: digest}, indent=1) + "\n"


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return what state.json says: `step`, `model` and more that the run gave, and what the save noted itself.

    That is `engine` (zero_stage, world_size, tensor_parallel, precision), `partitions`, `files` (name -> bytes, sha256) and
    `saved_at`.

    Raises UserError if `checkpoint` is not a complete checkpoint or its state.json was changed.
    """
    found = _state_or_problem(checkpoint)
    if isinstance(found, str):
        raise UserError(f"{checkpoint} is not a whole checkpoint: {found}; choose another")
    return found


def damage(checkpoint: Path, files: Mapping[str, Any], *, contents: bool = True) -> list[str]:
    """Return what is wrong with `files`, entries of `files` in a checkpoint's state: a clause each, which begins with the name.

    contents: read them through; otherwise only what is missing or cut is found.
    """
    problems = []
    for name, entry in files.items():
        path, record = checkpoint / name, FileRecord(**entry)
        try:
            if not path.is_file():
                problems.append(f"{name} is missing")
            elif path.stat().st_size != record.bytes:
                problems.append(f"{name} has {path.stat().st_size} bytes instead of {record.bytes}")
            elif contents and read_record(path) != record:
                problems.append(f"{name} is not as it was written")
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror})")
    return problems


def problems_of(checkpoint: Path, *, contents: bool = True) -> list[str]:
    """Return what is wrong with a checkpoint as `damage` does, or that its state.json cannot be used; empty if it is whole."""
    found = _state_or_problem(checkpoint)
    return [found] if isinstance(found, str) else damage(checkpoint, found["files"], contents=contents)


def refuse_damaged(checkpoint: Path, problems: Sequence[str]) -> None:
    """Raise UserError if there are problems, such as `damage` returns."""
    if problems:
        raise UserError(f"{checkpoint} is damaged: {', '.join(problems)}; choose another checkpoint")


def verify_together(checkpoint: Path, topology: "Topology") -> list[str]:
    """`problems_of(checkpoint)` on every process, the reading shared between the processes of each machine.

    Machines do not share it: what one can read from a common disk tells nothing of another.
    """
    places = topology.gather(platform.node())
    mates = [rank for rank, place in enumerate(places) if place == places[topology.rank]]
    found = _state_or_problem(checkpoint)
    files: dict[str, Any] = {} if isinstance(found, str) else found["files"]
    by_size = sorted(files, key=lambda name: -int(files[name]["bytes"]))
    own = by_size[mates.index(topology.rank) :: len(mates)]
    problems = [found] if isinstance(found, str) else damage(checkpoint, {name: files[name] for name in own})
    topology.meet()  # reading may take longer than any collective waits
    everyones = list(dict.fromkeys(itertools.chain.from_iterable(topology.gather(problems))))
    if not everyones:
        _verified.update(_fingerprint(checkpoint / name, entry) for name, entry in files.items())
    return everyones


def not_verified(checkpoint: Path, files: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of `files` of a checkpoint that `verify_together` has not read, or that have changed since."""
    return {name: entry for name, entry in files.items() if _fingerprint(checkpoint / name, entry) not in _verified}


def entries(folder: Path) -> list[Entry]:
    """Return the checkpoints in a `checkpoints` folder by rising step, those that cannot be read first.

    Empty if there is no such folder. Raises RefusedError if it cannot be listed.
    """
    found = []
    for path in _listed(folder):
        if path.name[0] == "." or path.name == LATEST or _DAMAGED in path.suffix or not _looks_like_one(path):
            continue
        state = _state_or_problem(path)
        found.append(Entry(path.name, None, state) if isinstance(state, str) else Entry(path.name, state, ""))
    return sorted(found, key=lambda entry: -1 if entry.state is None else int(entry.state["step"]))


def _listed(folder: Path) -> list[Path]:
    with refused(f"cannot list the checkpoints in {folder}", "make it a folder that can be read and written"):
        return sorted(folder.iterdir()) if os.path.lexists(folder) else []


def _looks_like_one(path: Path) -> bool:
    """Return whether a folder holds a checkpoint or may: one that cannot be listed counts."""
    try:
        return any(file.name == STATE or file.suffix == ".pt" for file in path.iterdir())
    except NotADirectoryError:
        return False
    except OSError:
        return True


def checkpoints_folder(path: Path) -> Path:
    """Return the folder of checkpoints that a run directory, or that folder itself, stands for."""
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


def resolve(path: Path, wanted_id: str, names: tuple[str, str] = ("load.path", "load.id")) -> Path:
    """Return the one checkpoint meant by `load.path` and `load.id`; whether it is whole is not looked at.

    path: a run directory, its `checkpoints` folder, or one checkpoint. wanted_id: `latest`, an id, or a unique prefix of
    one. names: of the two for the user. Raises UserError, listing the ids there are, if none or several match.
    """
    given, asked = f"{names[0]}={path}", f"{names[1]}={wanted_id}"
    if not path.is_dir():
        raise UserError(f"{given} is not a folder; give a run directory, its checkpoints folder or one checkpoint")
    if (path / STATE).is_file():
        if wanted_id == LATEST or path.name.startswith(wanted_id):
            return path
        raise UserError(f"{given} is the checkpoint {path.name} and {asked} another; give one of the two")
    folder = checkpoints_folder(path)
    ids = [entry.id for entry in entries(folder)]
    if not ids:
        raise UserError(f"{given} holds no complete checkpoint; give a run directory that does")
    pointer, newest = folder / LATEST, latest_id(folder)
    matches = [newest] if wanted_id == LATEST else [name for name in ids if name.startswith(wanted_id)]
    if wanted_id in ids:
        matches = [wanted_id]
    if len(matches) == 1 and matches[0] in ids:
        return folder / matches[0]
    fault = f" fits {len(matches)} checkpoints" if matches else " fits no checkpoint"
    if wanted_id == LATEST:
        fault = f", but {pointer} names {newest!r}, which is not there"
        fault = fault if pointer.is_file() else f", but the file {pointer} is missing"
    raise UserError(f"{asked}{fault}; name one of the checkpoints in {folder}: {', '.join(ids)}")


def latest_id(folder: Path) -> str:
    """Return what the file `latest` says; empty without it."""
    pointer = folder / LATEST
    return pointer.read_bytes().decode(errors="replace").strip() if pointer.is_file() else ""


def make_folder(folder: Path) -> None:
    """Make the `checkpoints` folder of a run that begins, with the mark that no checkpoint was saved in it yet.

    A folder with checkpoints is left as it is. Raises RefusedError if the folder cannot be made or written.
    """
    if entries(folder):
        return
    with refused(f"cannot write {folder}", _WRITABLE):
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / NONE_YET, "no checkpoint was saved here yet\n")
        flush_folder(folder.parent)


def has_lost_all(folder: Path) -> bool:
    """Return whether no checkpoint is in the `checkpoints` folder of a run that has trained, though one was saved there."""
    return not entries(folder) and not (folder / NONE_YET).exists()


def check_id(folder: Path, checkpoint_id: str) -> None:
    """Raise UserError if a new checkpoint in `folder` cannot have this id."""
    path = Path(checkpoint_id)
    plain = checkpoint_id == path.name and checkpoint_id not in {"", LATEST} and path.name[0] != "."
    if not plain or _DAMAGED in path.suffix or len(_unfinished(checkpoint_id).encode()) > _LONGEST_NAME:
        what = f"checkpoint.id_format gives the id {checkpoint_id!r}, which cannot be a folder's name"
        raise UserError(f"{what}; use at most 200 letters, digits, - and _")
    if os.path.lexists(folder / checkpoint_id):
        what = f"checkpoint {checkpoint_id} is already in {folder} and checkpoints are never overwritten"
        raise UserError(f"{what}; move it away, or give the run another name")


def check_ids(folder: Path, id_format: str, after: int) -> None:
    """Raise UserError if the checkpoint of some step after `after` cannot have its id. id_format: of the run config.

    Raises RefusedError if `folder` is there and nothing can be written into it, which the first save would find.
    """
    check_id(folder, id_format.format(step=10**12, epoch=10**6))
    numbers = {"step": "(?P<step>[0-9]+)", "epoch": "[0-9]+"}
    pattern = ""
    for text, name, _, _ in string.Formatter().parse(id_format):
        pattern += re.escape(text) + (numbers[name] if name else "")
        if name == "step":
            numbers[name] = "[0-9]+"  # a second time
    for path in _listed(folder):
        match = re.fullmatch(pattern, path.name)
        if match and int(match["step"]) > after:
            check_id(folder, path.name)
    if folder.is_dir():
        with refused(f"cannot write {folder}", _WRITABLE), tempfile.TemporaryFile(dir=folder):
            pass


def surplus(
    folder: Path, keep_last: int, keep_every_steps: int | None = None, *, verified_id: str | None = None
) -> list[str]:
    """Return the ids that may be removed from `folder`, by rising step.

    The `keep_last` newest stay, those whose step is a multiple of `keep_every_steps`, the one that `latest` names, all that
    cannot be read, and if none of these is whole, the newest that is. verified_id: one that is known to be whole.
    """
    steps = {entry.id: int(entry.state["step"]) for entry in entries(folder) if entry.state is not None}
    ids = list(steps)
    kept = {*ids[-keep_last:], latest_id(folder)}
    if keep_every_steps is not None:
        kept |= {name for name, step in steps.items() if step % keep_every_steps == 0}
    removable = [name for name in ids if name not in kept]
    if not removable or verified_id in kept:
        return removable
    # One that stays counts as the last whole one only if it is.
    for name in reversed([*removable, *(name for name in ids if name in kept)]):
        if not problems_of(folder / name):
            return [other for other in removable if other != name]
    return []


def remove(folder: Path, checkpoint_id: str) -> None:
    """Remove a checkpoint; of one that is a symbolic link the link alone, as what it points to may be kept on purpose.

    The checkpoint loses its id first: a removal that is cut short must not leave half of one under its id.
    """
    doomed = (folder / checkpoint_id).rename(free_name(folder, checkpoint_id))
    flush_folder(folder)
    _remove_folder(doomed)


def free_name(folder: Path, checkpoint_id: str) -> Path:
    """Return a path in `folder` that is not there, by which what a save or a removal leaves there is known."""
    names = itertools.chain([checkpoint_id], (f"{checkpoint_id}.{number}" for number in itertools.count(2)))
    return next(path for name in names if not os.path.lexists(path := folder / _unfinished(name)))


def remove_unfinished(folder: Path) -> list[str]:
    """Remove what interrupted saves and removals left, and return a sentence for each that cannot be removed.

    Call it while no save is in progress.
    """
    problems = []
    for path in sorted(folder.glob(_unfinished("*"))):
        try:
            if path.is_dir() and ((path / STATE).is_file() or not any(path.iterdir())):
                _remove_folder(path)
        except OSError as error:
            why = error.strerror or error
            problems.append(f"{path}, left by an interrupted save, cannot be removed: {why}; remove it")
    return problems


def set_aside(folder: Path, checkpoint_id: str) -> str:
    """Rename a damaged checkpoint, so that no run meets it again, and return its new name."""
    names = (f"{checkpoint_id}{_DAMAGED}{number}" for number in itertools.count(1))
    name = next(name for name in names if not os.path.lexists(folder / name))
    (folder / checkpoint_id).rename(folder / name)
    return name


def _state_or_problem(checkpoint: Path) -> dict[str, Any] | str:
    """Return what state.json holds, or one clause on why that cannot be used."""
    try:
        text = (checkpoint / STATE).read_bytes().decode()
        state = json.loads(text)
    except FileNotFoundError:
        return f"{STATE} is missing"
    except OSError as error:
        return f"{STATE} cannot be read ({error.strerror})"
    except (ValueError, RecursionError):
        state = None
    if isinstance(state, dict) and {*_REQUIRED, _SEAL} <= state.keys():
        del state[_SEAL]
        if sealed(state) == text:
            return state if is_ours(state) else f"{STATE} says what no save of this project writes"
    return f"{STATE} is not as it was written"


def _unfinished(checkpoint_id: str) -> str:
    return f".{checkpoint_id}.tmp"


def _remove_folder(folder: Path) -> None:
    """Remove a folder, following no link. state.json goes last, because leftovers are known by it.

    Another process may remove the same.
    """
    with suppress(FileNotFoundError):
        if folder.is_symlink():
            folder.unlink()
            return
        for path in folder.iterdir():
            if path.name != STATE:
                with suppress(FileNotFoundError):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        shutil.rmtree(folder)


def _fingerprint(path: Path, entry: Mapping[str, Any]) -> tuple[Any, ...]:
    stat = path.stat()
    return path.resolve(), stat.st_ino, stat.st_mtime_ns, *entry.values()
