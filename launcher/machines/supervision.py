"""The processes of a launched run, seen from the machine that launched it: start, signals, the first failure, the end."""

import json
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from ..processes.rank_status import FOLDER_VARIABLE, REQUEUE, USAGE_ERROR, RankStatus, first_failure, read_statuses
from ..processes.words import rank_list
from . import host_process

SSH = (
    "ssh",
    # No question that nobody answers, and an end to a connection that is gone: it says nothing by itself.
    *("-o", "BatchMode=yes"),
    *("-o", "ConnectTimeout=10"),
    *("-o", "ServerAliveInterval=5"),
    *("-o", "ServerAliveCountMax=3"),
)

SSH_FAILED = 255
"""Exit code of ssh where the trouble is its own."""

_FAREWELL_S = 15.0
"""Time for the other machines to find the end of a failed one by themselves, and say so, before each of two signals."""
_POLL_S = 0.1
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class HostCommand:
    """What is run on one machine."""

    command: Sequence[str]
    directory: str
    environment: dict[str, str]
    """Variables beside those of the machine."""
    processes: int
    """Processes of the run that it starts there."""
    host: str
    """Name or address of the machine."""
    remote: bool
    """Whether the way there is ssh; otherwise it is this machine."""
    through_pdsh: bool = False
    """Whether it starts the run on other machines through pdsh, which passes SIGTERM on alone, and ends before the run."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    exit_code: int
    text: str
    """What failed, the traceback of the first process to fail last; empty after a success."""
    told_to_end: bool = False
    """Whether `launch` itself got a signal."""

    @property
    def may_start_again(self) -> bool:
        """Whether it failed of itself, and otherwise than by the command line and run config, which would be the same again."""
        return self.exit_code not in (0, USAGE_ERROR, REQUEUE) and not self.told_to_end


@dataclass
class _Host:
    """A machine while the run is on it."""

    command: HostCommand
    process: subprocess.Popen[bytes]
    stdin: IO[bytes]

    def has_ended(self) -> bool:
        """Return whether the command and its guard have ended. After a kill the guard ends what runs there, then the pipe."""
        if self.process.poll() is None:
            return False
        held = select.poll()
        held.register(self.stdin, 0)
        return bool(held.poll(0))  # an error: nobody reads the pipe any more

    def send(self, number: signal.Signals) -> None:
        if self.command.through_pdsh and number == signal.SIGUSR1:
            number = signal.SIGTERM
        self.write(number.name)

    def write(self, line: str) -> None:
        with suppress(OSError):  # it has ended, or its connection has; its exit code says so
            self.stdin.write(line.encode() + b"\n")
            self.stdin.flush()


def run_hosts(commands: Sequence[HostCommand], status_folder: Path, world_size: int) -> Outcome:
    """Run the commands to their end, and return how the run of `world_size` processes ended.

    Signals to this process are passed on to those of the run, and waited for. Once a machine has failed, the others are given
    time to end, then SIGTERM, then SIGKILL. status_folder: an empty folder that all machines see.
    """
    hosts: list[_Host] = []
    received: list[signal.Signals] = []
    try:
        with _handled(hosts, received):
            hosts += [_start(command, status_folder) for command in commands]
            _wait(hosts)
            if received and any(command.through_pdsh for command in commands):
                _wait_for_statuses(status_folder, world_size)
    finally:
        for host in hosts:  # the end of their stdin ends them, if something went wrong here
            with suppress(OSError):
                host.stdin.close()
    codes = {host.command.host: host.process.returncode for host in hosts}
    outcome = _outcome(codes, read_statuses(status_folder), world_size, received)
    return replace(outcome, told_to_end=bool(received))


def _start(command: HostCommand, status_folder: Path) -> _Host:
    script = [sys.executable, host_process.__file__]
    start = [*SSH, command.host, shlex.join(script)] if command.remote else script
    # In a session of its own, as Ctrl-C in the terminal would reach it too, and end ssh at once.
    process = subprocess.Popen(start, stdin=subprocess.PIPE, start_new_session=True)
    order = {
        "command": list(command.command),
        "directory": command.directory,
        "environment": {**command.environment, FOLDER_VARIABLE: str(status_folder)},
        "processes": command.processes,
    }
    assert process.stdin is not None, "started with a pipe"
    host = _Host(command, process, process.stdin)
    host.write(json.dumps(order))
    return host


@contextmanager
def _handled(hosts: list[_Host], received: list[signal.Signals]) -> Iterator[None]:
    """Pass signals on while inside; what would kill the processes of the run becomes a request to end."""

    def handle(number: int, frame: object) -> None:
        received.append(signal.Signals(number))
        passed_on = signal.SIGTERM if number in (signal.SIGHUP, signal.SIGUSR2) else signal.Signals(number)
        for host in hosts:
            host.send(passed_on)

    # nohup has a hang-up ignored: then the terminal may go, and the run goes on.
    handled = [n for n in _PASSED_ON if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    previous = {number: signal.signal(number, handle) for number in handled}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(hosts: list[_Host]) -> None:
    """Return when all have ended, which they must soon after one has failed."""
    last_words = [signal.SIGTERM, signal.SIGKILL]
    deadline = None
    while running := [host for host in hosts if not host.has_ended()]:
        failed = [host for host in hosts if host.process.poll()]
        if failed and deadline is None:
            deadline = time.monotonic() + _FAREWELL_S
        if deadline is not None and time.monotonic() > deadline:
            word = last_words.pop(0) if last_words else None
            for host in running:
                if word is None:  # not even its connection ends
                    host.process.kill()
                else:
                    host.send(word)
            deadline = time.monotonic() + _FAREWELL_S
        time.sleep(_POLL_S)


def _wait_for_statuses(folder: Path, world_size: int) -> None:
    """Return when all processes have said how they ended, or DeepSpeed's launcher has killed them, so long after SIGTERM."""
    deadline = time.monotonic() + host_process.GRACE_S
    while len(read_statuses(folder)) < world_size and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _outcome(
    codes: dict[str, int], statuses: dict[int, RankStatus], world_size: int, received: Sequence[signal.Signals]
) -> Outcome:
    """Return how the run ended. codes: exit status of each machine's command."""
    silent = [rank for rank in range(world_size) if rank not in statuses]
    failed = {host: _shell_code(code) for host, code in codes.items() if code}
    first = first_failure(statuses)
    agreed = not silent and len({status.exit_code for status in statuses.values()}) == 1
    if agreed and (first is None or not first.text):  # all as one: a success, or an end that they agreed on
        code = statuses[0].exit_code
        if code or not failed:
            return Outcome(code, f"all processes ended with {_described(code)}" if code else "")
    lines = [f"{host}: the launcher ended with {_described(code)}" for host, code in failed.items()]
    if silent:
        why = "killed from outside (for memory?), or the host is lost"
        if received:
            why = f"after {received[0].name}"
        elif first is not None:
            why = f"stopped after rank {first.rank} failed, or {why}"
        lines.append(f"{rank_list(silent)} ended without a word: {why}")
    if first is None:
        code = next(iter(failed.values()), 1)
        if received:  # it may have come before the processes were there to answer it
            code = 128 + signal.SIGINT if received[0] == signal.SIGINT else REQUEUE
        return Outcome(code, "\n".join(lines))
    later = [rank for rank, status in statuses.items() if status.exit_code and rank != first.rank]
    if later:
        lines.append(f"{rank_list(later)} failed after rank {first.rank}")
    lines.append(f"rank {first.rank} on {first.host} ended with {_described(first.exit_code)}")
    return Outcome(first.exit_code, "\n".join([*lines, *first.text.rstrip().splitlines()]))


def _shell_code(code: int) -> int:
    """Return a child's exit status as a shell reports it; the deepspeed launcher makes 256 - N of signal N."""
    lowest = 256 - max(signal.valid_signals())
    return 128 - code if code < 0 else 128 + 256 - code if code >= lowest and code != SSH_FAILED else code


def _described(code: int) -> str:
    if code == SSH_FAILED:
        return f"exit code {code}: ssh could not connect, or lost its connection"
    number = code - 128
    name = f" ({signal.Signals(number).name})" if number in signal.valid_signals() and number < 32 else ""
    return f"exit code {code}{name}"
