"""What the command line says of errors, and the status it leaves with: 1 for a failure, 2 for wrong usage, 75 for a signal."""

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

import typer

from ..processes.rank_status import REQUEUE


@contextmanager
def reported_errors(debug: bool, status: int = 1) -> Iterator[None]:
    """Turns errors that are meant for the user into text on stderr and an exit status; all others pass.

    status: that of errors which do not list `problems` of a run config; 2 where they are the command line's.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if debug:
            traceback.print_exc()
        problems = getattr(error, "problems", None)
        if problems is None:
            leave(f"error{_rank_note()}: {error}", status)
        leave("\n".join(problems), status=2)


@contextmanager
def requeued_by_signals() -> Iterator[None]:
    """Until a run handles them itself: a scheduler may want the machine back before everything is imported."""

    def requeue(number: int, frame: FrameType | None) -> None:
        if os.environ.get("RANK", "0") == "0":
            with suppress(OSError):  # what ends a run may have ended its console
                os.write(
                    sys.stderr.fileno(), f"{signal.Signals(number).name}: stopped before the first step\n".encode()
                )
        raise SystemExit(REQUEUE)

    before = {number: signal.signal(number, requeue) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is requeue:
                signal.signal(number, handler)


def leave(message: str, status: int) -> NoReturn:
    """Ends the process with a message on stderr.

    Status 2 is for the command line and the run config, which are the same in every process, so one of them reports.
    """
    if status != 2 or os.environ.get("RANK", "0") == "0":
        typer.echo(message, err=True)
    raise typer.Exit(status)


def _rank_note() -> str:
    return f" (rank {os.environ.get('RANK', '0')})" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
