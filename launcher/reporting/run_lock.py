"""One run at a time in a run directory: two would write the same checkpoints and lose each other's metrics."""

import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...kernels.errors import UserError, refused
from ..processes import console

NAME = ".lock"


@contextmanager
def only_run(root: Path) -> Iterator[None]:
    """Keep other processes out of the run directory `root`, on any machine whose file system shares locks.

    The system frees the lock when this process ends, however it ends. Without locks there is a warning. Raises UserError if
    another process holds the lock, and RefusedError if the directory cannot be written.
    """
    path = root / NAME
    with refused(f"cannot write {path}", "choose another --output_dir"):
        opened = path.open("a+", encoding="utf-8")
    with opened as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, whose lock children inherit and may keep
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"output folder {root} is in use by another run, {file.read()}; wait for its end, or start this one with "
                f"another --job_name (if that process is gone with its machine, remove {path})"
            ) from None
        except OSError as error:
            console.warn(
                f"{path} cannot be locked ({error.strerror}), so nothing keeps another run out of this directory"
            )
        with refused(f"cannot write {path}", "free space or choose another --output_dir"):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
        yield
