"""Stopping a run by Ctrl-C or SIGTERM: the step is finished on every process, then all stop together."""

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any

from .topology import Topology

_EXIT_CODE_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


class StopRequest:
    """A context in which the first SIGINT or SIGTERM asks for a stop and a second SIGINT ends the process at once.

    To be entered on the main thread; afterwards the handlers are those from before.
    """

    def __init__(self, topology: Topology) -> None:
        self.requested = False
        """Whether this process was told to stop; the others may not know yet."""
        self._topology = topology
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """True on every process alike once one of them was told to stop; to be called by all after the same step.

        Launchers signal processes one after another: without this they would stop at different steps and wait for ever.
        """
        return self._topology.any(self.requested)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            # A second SIGTERM is no impatience: launchers pass a Ctrl-C on as SIGTERM to processes that have seen it.
            if number == signal.SIGINT:
                os._exit(_EXIT_CODE_INTERRUPTED)  # not sys.exit: the process may be deep in a collective
            return
        self.requested = True
        if self._topology.is_main:
            name = signal.Signals(number).name
            text = f"\n{name}: finishing this step, then saving a checkpoint; Ctrl-C again leaves at once\n"
            # One write, past Python's buffers: the signal may have interrupted a print.
            os.write(sys.stderr.fileno(), text.encode())
