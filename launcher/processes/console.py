"""The console of a run. It may go before the run does: a pipe that nobody reads any more, a closed terminal, a lost ssh."""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

_GONE = (errno.EPIPE, errno.EIO)  # a pipe, a terminal


def say(text: str) -> None:
    """A line on stdout, in one write, so that lines of several processes do not interleave."""
    with surviving(sys.stdout):
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


def warn(text: str) -> None:
    """A line on stderr, past a progress bar if there is one."""
    with surviving(sys.stderr):
        tqdm.write(f"warning: {text}", file=sys.stderr)


@contextmanager
def surviving(stream: TextIO) -> Iterator[None]:
    """Inside, what the stream does not take is lost, and the run goes on; its log file has what matters."""
    try:
        yield
    except OSError as error:
        if error.errno in _GONE:
            # For all that writes there later, and for Python's own flush at the end, which would change the exit status.
            with suppress(OSError), Path(os.devnull).open("wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())


Say = Callable[[str], None]
