"""Say what went wrong, and end with a status: 1 for a failure, 2 for wrong usage, 75 for a signal."""

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import typer

from ...kernels.errors import UserError
from ..processes.console import write_now
from ..processes.rank_status import REQUEUE, USAGE_ERROR, Exit, traceback_text

_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def reported_errors(debug: bool, status: int = 1) -> Iterator[None]:
    """End the process with the text of a UserError inside as its message; all other errors pass.

    A path that the system does not let this user read or write is no fault of ours either, wherever it is met.
    debug: print the traceback too. status: the exit status; that of a faulty run config is 2 in any case.
    """
    try:
        yield
    except (UserError, OSError) as error:
        from ..config.file import ConfigError

        text = str(error)
        if not isinstance(error, UserError):
            if error.errno not in _FORBIDDEN or error.filename is None:
                raise
            text = f"{error.filename}: {error.strerror}; correct its permissions, or name another"
        if debug:
            typer.echo(traceback_text(error), err=True, nl=False)
        if isinstance(error, ConfigError):
            leave(text, USAGE_ERROR)
        leave(f"error{_rank_note()}: {text}", status)


@contextmanager
def reported_faults() -> Iterator[None]:
    """End the process with the traceback of any other error as its message: such an error is a fault of this project."""
    try:
        yield
    except Exception as error:
        note = "this is a fault of xformer-train; please report it with the traceback above"
        leave(f"{traceback_text(error)}error{_rank_note()}: {note}", status=1)


@contextmanager
def requeued_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGUSR1 end the process with status 75 inside, until a run handles them.

    A scheduler may want the machine back before everything is imported. Afterwards both have no effect, to the very end of the
    process: Python gives signals that it handles itself back to the system, which would end the process by them, whatever
    status it was about to end with.
    """

    def requeue(number: int, frame: FrameType | None) -> None:
        if os.environ.get("RANK", "0") == "0":
            write_now(f"{signal.Signals(number).name}: stopped before the first step\n")
        raise SystemExit(REQUEUE)

    handled = (signal.SIGTERM, signal.SIGUSR1)
    for number in handled:
        signal.signal(number, requeue)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_IGN)


def leave(message: str, status: int) -> NoReturn:
    """End the process with a message on stderr.

    Status 2 is for the command line and the run config, which are the same in every process, so one of them reports.
    """
    if status != 2 or os.environ.get("RANK", "0") == "0":
        typer.echo(message, err=True)
    raise Exit(status, message)


def _rank_note() -> str:
    return f" (rank {os.environ.get('RANK', '0')})" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
