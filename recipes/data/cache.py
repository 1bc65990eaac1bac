"""Folders of prepared data: built once, found by name afterwards, whole or not there at all."""

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from ...kernels.errors import RefusedError, UserError
from ..recipe import Report

_MANIFEST = "manifest.json"


def cache_folder(given: str | None) -> Path:
    """data.cache_dir, or the user's cache folder for this program. Raises UserError if the user has no home folder."""
    try:
        if given is not None:
            return Path(given).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xformer-train"
    except RuntimeError as error:  # in a container, for one
        why = str(error).rstrip(".")
        raise UserError(f"data.cache_dir={given}: {why}; name a folder that can be written") from None


def write_atomically(path: Path, text: str) -> None:
    """Write a small file of the cache so that a reader finds all of it or the one before; creates its folder.

    Raises RefusedError if the cache cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
        partial.write_text(text)
        _flush(partial)
        partial.replace(path)
    except OSError as error:
        raise _unusable(path.parents[1], error) from error


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder, whose files are those of `folder` when the block ends without an error; else nothing is left of it.

    A new `folder` comes into being whole. In one that exists, files of the same names are replaced and others stay.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Not of tempfile, which keeps others out whatever the umask says.
    partial = folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}")
    partial.mkdir()
    try:
        yield partial
        _flush(*partial.iterdir(), partial)
        if folder.exists():
            for path in partial.iterdir():
                path.replace(folder / path.name)
        else:
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _flush(*paths: Path) -> None:
    """Bring files, and the names in folders, to the disk.

    A power cut leaves zeros in a file that was renamed before, of the right size.
    """
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems flush no folders
                raise
        finally:
            os.close(descriptor)


def _unusable(cache: Path, error: OSError) -> RefusedError:
    return RefusedError(f"data.cache_dir={cache}: {error.strerror or error}; name a folder that can be written")


def open_or_build(folder: Path, build: Callable[[Path], dict[str, Any]], report: Report) -> dict[str, Any]:
    """The facts of a prepared folder, built first if it is not there.

    build: writes its files into the empty folder it is given and returns the facts (JSON values). It works in a temporary
    folder, renamed when all is written, so a process killed half-way leaves nothing that could be taken for prepared data.
    Processes of one machine that want the same folder wait for the first; machines that share the cache may both build, and
    the first to finish wins.
    Raises UserError if the folder is damaged, RefusedError if the cache cannot be written or locked.
    """
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = folder.with_name(f"{folder.name}.lock").open("a")
        except OSError as error:
            raise _unusable(folder.parents[1], error) from error
        with lock:
            _wait_for(lock, folder.parents[1], report)
            if not folder.exists():
                _build(folder, build)
    return _checked_facts(folder, report)


def _wait_for(lock: IO[str], cache: Path, report: Callable[[str], None]) -> None:
    """Lock an open file against all other processes, until it is closed or this process ends, however it ends."""
    try:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, whose lock children inherit and may keep
        except BlockingIOError:
            report("waiting for another process that prepares the same data")
            fcntl.lockf(lock, fcntl.LOCK_EX)
    except OSError as error:
        raise _unusable(cache, error) from error


def _build(folder: Path, build: Callable[[Path], dict[str, Any]]) -> None:
    # Whatever lies there is of a process of this machine that was killed: the lock is ours.
    partial = folder.with_name(f"{folder.name}.{socket.gethostname()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        facts = build(partial)
        paths = sorted(partial.iterdir())
        sizes = {path.name: path.stat().st_size for path in paths}
        written = {path.name: [path.stat().st_mtime_ns, _digest(path)] for path in paths}
        (partial / _MANIFEST).write_text(json.dumps({"facts": facts, "bytes": sizes, "written": written}, indent=1))
        _flush(*partial.iterdir(), partial)
        try:
            partial.rename(folder)
            _flush(folder.parent)
        except OSError:
            if not folder.exists():  # else another machine was faster
                raise
    except UserError:
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise _unusable(folder.parents[1], error) from error
        remedy = "make room or name another folder"
        raise RefusedError(f"data.cache_dir={folder.parents[1]}: no space left for prepared data; {remedy}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _checked_facts(folder: Path, report: Report) -> dict[str, Any]:
    remedy = f"remove {folder} to have it prepared again"
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        raise UserError(f"prepared data: {folder / _MANIFEST} is missing or damaged; {remedy}") from None
    for name, size in manifest["bytes"].items():
        path = folder / name
        found = path.stat().st_size if path.exists() else 0
        if found != size:
            raise UserError(f"prepared data: {path} has {found:,} bytes, must have {size:,}; {remedy}")
    for name, (time_ns, digest) in manifest.get("written", {}).items():  # not in folders of older versions
        path = folder / name
        if path.stat().st_mtime_ns == time_ns:
            continue
        report(f"prepared data: {path} has another time than when it was written; comparing what it holds")
        if _digest(path) != digest:
            raise UserError(f"prepared data: {path} does not hold what was written there; {remedy}")
        with suppress(OSError):  # a cache of somebody else; then it is compared each time
            os.utime(path, ns=(time_ns, time_ns))
    facts: dict[str, Any] = manifest["facts"]
    return facts


def read_array(path: Path, dtype: str) -> np.ndarray:
    """The numbers of a raw file, (N,), mapped into memory and read-only."""
    if path.stat().st_size == 0:  # nothing to map
        return np.empty(0, dtype=dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))
