"""Files that are on the disk, not only in the system's memory, when a function here returns, and their checksums. No torch."""

import errno
import hashlib
import os
import shutil
from pathlib import Path
from typing import NamedTuple


class FileRecord(NamedTuple):
    """What tells a file from a damaged one."""

    bytes: int
    sha256: str
    """Hexadecimal, as sha256sum prints it."""


class DurableFile:
    """A new file, written from start to end within a `with` block and on the disk after it; `record` counts along."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._hash = hashlib.sha256()
        self._bytes = 0

    @property
    def record(self) -> FileRecord:
        """Of what was written so far."""
        return FileRecord(self._bytes, self._hash.hexdigest())

    def write(self, data: bytes | memoryview) -> int:
        self._hash.update(data)
        self._bytes += memoryview(data).nbytes
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def __enter__(self) -> "DurableFile":
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        with self._file:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())


def write_text(path: Path, text: str) -> FileRecord:
    """Write `text` into a new file and return its record."""
    with DurableFile(path) as file:
        file.write(text.encode(errors="surrogateescape"))  # what was read of a damaged file goes back as it was
    return file.record


def replace_text(path: Path, text: str) -> None:
    """Put `text` in the place of a file in one step: a crash or a full disk leaves the old one. Raises OSError."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write_text(temporary, text)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def copy_into(source: Path | str, folder: Path, name: str) -> dict[str, FileRecord]:
    """Copy a file or folder, or a text if `source` is a str, to `folder/name`. Return its files by name in `folder`."""
    if isinstance(source, str):
        return {name: write_text(folder / name, source)}
    if not source.is_dir():
        with source.open("rb") as original, DurableFile(folder / name) as file:
            shutil.copyfileobj(original, file)
        return {name: file.record}
    (folder / name).mkdir()
    records: dict[str, FileRecord] = {}
    for path in sorted(source.iterdir()):
        records |= copy_into(path, folder, f"{name}/{path.name}")
    return records


def read_record(path: Path, *, from_disk: bool = False) -> FileRecord:
    """Return the record of a file as it is. from_disk: not that of the copy that Linux has in its memory after a write."""
    with path.open("rb") as file:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(file.tell(), digest)


def flush_folders(folder: Path) -> None:
    """Make the names in `folder` and in the folders below survive a power cut."""
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        flush_folder(path)


def flush_folder(folder: Path) -> None:
    """Do as `flush_folders` for one folder. Windows has no such call, and some network file systems refuse it."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)
