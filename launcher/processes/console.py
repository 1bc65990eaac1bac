"""The console of a run. It may go before the run does: a pipe that nobody reads any more, a closed terminal, a lost ssh."""

import errno
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from tqdm import tqdm

_GONE = (errno.EPIPE, errno.EIO, errno.EBADF)  # a pipe, a terminal, one that was closed
# Before there is a log file the console alone speaks of errors, and not through Python's handler of last resort.
logging.getLogger(__package__.rpartition(".")[0]).addHandler(logging.NullHandler())


def quieten_libraries() -> None:
    """Silence what PyTorch and DeepSpeed say of themselves on import and at start. Call it before either is imported."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not sys.warnoptions:
        for module in ("torch", "deepspeed"):
            for category in (FutureWarning, DeprecationWarning):
                warnings.filterwarnings("ignore", category=category, module=rf"{module}(\.|$)")


def open_missing_streams() -> None:
    """Open those of stdin, stdout and stderr that the process was started without, on the null device.

    Otherwise the next file that is opened takes the number of the missing one, and gets what libraries write there.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            os.set_inheritable(nowhere, True)
            stream = os.fdopen(nowhere, mode, encoding="utf-8")
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def say(text: str) -> None:
    """Write a line on stdout, in one write, so that lines of several processes do not interleave."""
    with surviving(sys.stdout):
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


def warn(text: str, log: logging.Logger | None = None, *, shown: bool = True) -> None:
    """Write a line on stderr, past a progress bar if there is one, and into the log file if a logger is given.

    shown: False for the log file alone, on all processes but the one that speaks for them.
    """
    if log is not None:
        log.warning(text)
    if shown:
        with surviving(sys.stderr):
            tqdm.write(f"warning: {text}", file=sys.stderr)


def write_now(text: str) -> None:
    """Write a text on stderr past Python's buffers, for signal handlers and threads, which may have interrupted a print."""
    with suppress(OSError):  # nobody may read the console any more
        os.write(sys.stderr.fileno(), text.encode())


@contextmanager
def surviving(stream: TextIO) -> Iterator[None]:
    """Lose what the stream does not take inside, and go on; the log file of the run has what matters."""
    try:
        yield
    except OSError as error:
        if error.errno in _GONE:
            # For all that writes there later, and for Python's own flush at the end, which would change the exit status.
            with suppress(OSError):
                nowhere = os.open(os.devnull, os.O_RDWR)
                if nowhere != stream.fileno():
                    os.dup2(nowhere, stream.fileno())
                    os.close(nowhere)
