"""Stopping a run by Ctrl-C or by a scheduler's signal: the step is finished on every process, then all stop together."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from . import console
from .rank_status import REQUEUE
from .topology import Topology

_EXIT_CODE_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_NOTHING, _INTERRUPT, _SCHEDULER = range(3)  # what processes tell each other; the largest counts


class StopAsked(KeyboardInterrupt):
    """Say that a signal came while there was nothing to save. It is no Exception, so that no library handles it."""


class StopRequest:
    """A context in which the first SIGINT, SIGTERM or SIGUSR1 asks for a stop and a second SIGINT ends the process at once.

    Enter it on the main thread of every process alike. On leaving it the handlers from before come back. After a run that ended
    without an error, SIGTERM and SIGUSR1 have no effect instead: the process ends by itself with its status, and launchers send
    SIGTERM to other processes once one has ended, or pass a Ctrl-C on as SIGTERM.
    """

    def __init__(self, topology: Topology) -> None:
        self.received: signal.Signals | None = None
        """The first signal that this process got. The other processes may not know yet."""
        self._topology = topology
        self._previous: dict[int, Any] = {}
        self._raises = False
        self._said = False
        self._all_told = _NOTHING
        self._asked: tuple[dist.Work, torch.Tensor] | None = None
        self._group: dist.ProcessGroup | None = None

    def __enter__(self) -> "StopRequest":
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None and self._asked is not None:
            self._asked[0].wait()  # all have asked; what is still under way when Python ends aborts the process
        for number, handler in self._previous.items():
            signal.signal(number, _nothing if error is None and number != signal.SIGINT else handler)

    @property
    def exit_status(self) -> int:
        """REQUEUE once all agreed to stop because of SIGTERM or SIGUSR1; 0 before, and after Ctrl-C: that was a person."""
        return REQUEUE if self._all_told == _SCHEDULER else 0

    def agreed(self) -> bool:
        """Return True on every process alike, from some call on, if one of them got a signal; all call it at the same points.

        Launchers and schedulers signal processes one after another, or one only: without this they would stop at different
        steps and wait for ever. With several processes the answer is that to the call before, which has come meanwhile, so
        that nobody waits: a stop takes effect one call late.
        """
        if self._topology.world_size == 1:
            return self._told(self._own())
        before, self._asked = self._asked, self._ask(self._own())
        return self._told(_NOTHING if before is None else self._answer(before)[0])

    def agreed_now(self) -> bool:
        """Return the same as `agreed`, after waiting for the answers of all processes to this call."""
        return self.agreed_with()[0]

    def agreed_with(self, *numbers: float) -> tuple[bool, list[float]]:
        """Return `agreed_now`, and the largest of each number over all processes, each of which gives as many.

        Hosts wait for each other here, but none waits for its device.
        """
        if self._topology.world_size == 1:
            return self._told(self._own()), list(numbers)
        level, *largest = self._answer(self._ask(self._own(), *numbers))
        return self._told(level), largest

    def _own(self) -> int:
        return _NOTHING if self.received is None else _INTERRUPT if self.received == signal.SIGINT else _SCHEDULER

    def _ask(self, *numbers: float) -> tuple[dist.Work, torch.Tensor]:
        if self._group is None:
            # On the CPU whatever the device is: asking a GPU would make the host wait for it at every step.
            self._group = dist.new_group(backend="gloo")
        asked = torch.tensor(numbers, dtype=torch.float64)
        return dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group, async_op=True), asked

    def _answer(self, asked: tuple[dist.Work, torch.Tensor]) -> list[float]:
        asked[0].wait()
        answer: list[float] = asked[1].tolist()
        return answer

    def _told(self, level: float) -> bool:
        """Return whether a process was told to stop, now or before; say so if it was another one."""
        self._all_told = max(self._all_told, int(level))
        told = self._all_told != _NOTHING
        if told and self.received is None and not self._said:
            self._say("another process was told to stop")
        return told

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Raise StopAsked at a signal inside, without delay: for work that may take hours and saves nothing."""
        if self.received is not None:
            raise StopAsked
        self._raises = True
        try:
            yield
        finally:
            self._raises = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            # A second SIGTERM is no impatience: launchers pass a Ctrl-C on as SIGTERM to processes that have seen it, and
            # Slurm sends SIGUSR1 first and SIGTERM later.
            if number == signal.SIGINT:
                os._exit(_EXIT_CODE_INTERRUPTED)  # not sys.exit: the process may be deep in a collective
            return
        self.received = signal.Signals(number)
        self._say(self.received.name)
        if self._raises:
            raise StopAsked

    def _say(self, why: str) -> None:
        self._said = True
        if not self._topology.is_main:
            return
        what = "stopping" if self._raises else "finishing this step, then saving a checkpoint"
        console.write_now(f"\n{why}: {what}; Ctrl-C again leaves at once\n")


def _nothing(number: int, frame: FrameType | None) -> None:
    """Handle a signal that changes nothing any more. Not SIG_IGN, which child processes would inherit."""
