"""How each process of a launched run ended: a small file per rank, which tells `launch` what no launcher's exit code does.

The deepspeed launcher exits with 0 in some failures, and ends with one process's code in all others. Quick to import.
"""

import json
import os
import platform
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from .durable_files import replace_text

FOLDER_VARIABLE = "XFORMER_TRAIN_STATUS_DIR"
"""Environment variable with the folder of these files; set by `launch` and by no one else."""

USAGE_ERROR = 2
"""Exit status for a wrong command line or run config."""

REQUEUE = 75
"""Exit status of a run that a scheduler stopped and may start again: EX_TEMPFAIL of sysexits.h."""

_RANK_VARIABLES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


class Exit(SystemExit):
    """End this process with a status and with the message that its end is reported by."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(status)
        self.message = message


@dataclass(frozen=True)
class RankStatus:
    """The end of one process."""

    rank: int
    host: str
    exit_code: int
    time_s: float
    """When, in seconds since 1970, by the clock of its host."""
    text: str
    """The traceback, or the message where the error was meant for the user; empty after a success."""


@contextmanager
def recorded() -> Iterator[None]:
    """Write how this process left the block, if `launch` has asked for it; change nothing else."""
    exit_code, text = 0, ""
    try:
        yield
    except SystemExit as leaving:
        exit_code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        text = leaving.message if isinstance(leaving, Exit) else ""
        raise
    except BaseException as error:
        exit_code, text = 1, traceback_text(error)
        raise
    finally:
        write_status(exit_code, text)


def write_status(exit_code: int, text: str) -> None:
    """Write how this process is about to end, if `launch` has asked for it; for an end that `recorded` does not see.

    Whatever happens here, the process ends as it would have: without its file it is reported as silent.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    rank = process_rank()
    if folder is None or rank is None or not rank.isdecimal():
        return
    status = RankStatus(int(rank), platform.node(), exit_code, time.time(), text)
    with suppress(OSError):
        replace_text(Path(folder) / f"rank{status.rank}.json", json.dumps(asdict(status)))


def process_rank() -> str | None:
    """Return what a launcher says that the rank of this process is, None without a launcher."""
    return next((os.environ[name] for name in _RANK_VARIABLES if name in os.environ), None)


def read_statuses(folder: Path) -> dict[int, RankStatus]:
    """Return the statuses that are there, by rank."""
    statuses = (RankStatus(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("rank*.json"))
    return {status.rank: status for status in sorted(statuses, key=lambda status: status.rank)}


def first_failure(statuses: dict[int, RankStatus]) -> RankStatus | None:
    """Return the failure that came first; the later ones follow from it, as a rule: their peer was gone."""
    failures = [status for status in statuses.values() if status.exit_code]
    # A process that only left with the others has nothing to say.
    return min(failures, key=lambda status: (not status.text, status.time_s), default=None)


def traceback_text(error: BaseException) -> str:
    """Return the traceback without the frames of the command line's library, which say nothing of the run."""
    described = traceback.TracebackException.from_exception(error)
    kept = [frame for frame in described.stack if f"{os.sep}typer{os.sep}" not in frame.filename]
    described.stack = traceback.StackSummary.from_list(kept)
    return "".join(described.format())
