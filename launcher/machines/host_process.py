"""Runs one command for `xformer-train launch` on one machine, and leaves no process of it behind.

Started directly or through ssh, as a script, so it imports the standard library only. The first line of stdin is a JSON object:
    command       list of arguments
    directory     where it runs
    environment   variables that are set beside those of this machine
    processes     how many processes of a run it starts here
Each further line is the name of a signal to pass on, such as SIGTERM. The end of stdin means that `launch` is gone or its
connection is, and ends the command; so does the end of this process, though it be killed. Exit code: the command's (128 + N
after signal N); 1 if it came to an end with processes of it left running, whatever its code.
"""

import json
import os
import platform
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

GRACE_S = 30.0
"""Time to save a checkpoint for processes that lost their launcher."""
_QUIET_EXIT_S = 2.0  # helpers of a process, such as multiprocessing's resource tracker, outlive it a little
_POLL_S = 0.1
_RANK_VARIABLES = ("RANK", "LOCAL_RANK")


def main() -> int:
    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as unbuffered:  # the next lines are for `select`
        line = unbuffered.readline()
    if not line:
        return 1
    order = json.loads(line)
    try:
        command = subprocess.Popen(
            order["command"],
            cwd=order["directory"],
            env=_environment(order),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        said = f"cannot start a run on {platform.node()}: {error.filename}: {error.strerror}"
        remedy = "Python, the packages and the working folder must be at the same paths on all hosts"
        print(f"{said}; {remedy}", file=sys.stderr, flush=True)
        return 1
    guard, lifeline = _start_guard(command.pid)
    lost_control = _pass_signals_on(command)
    if lost_control:
        _end(command.pid, GRACE_S)
    code = command.wait()
    left = _wait_until_empty(command.pid, _QUIET_EXIT_S)
    if left:
        print(f"the launcher ended and left {left} processes running; they are stopped", file=sys.stderr, flush=True)
        _end(command.pid, GRACE_S)
    os.close(lifeline)
    os.waitpid(guard, 0)
    if code < 0:
        return 128 - code
    return code or int(bool(left) or lost_control)


def _start_guard(session: int) -> tuple[int, int]:
    """Start a process that ends the session once this one is gone. Return its id, and the pipe whose end tells it so.

    It keeps stdin open, by which `launch` knows that it is not done yet.
    """
    told, lifeline = os.pipe()
    guard = os.fork()
    if guard:
        os.close(told)
        return guard, lifeline
    os.close(lifeline)
    os.setsid()  # who kills this process with its group spares the guard
    os.read(told, 1)
    _end(session, GRACE_S)
    os._exit(0)


def _environment(order: dict[str, Any]) -> dict[str, str]:
    """Return the command's variables: this machine's, changed by the order, and a share of the cores for each process."""
    environment = {**os.environ, **order["environment"]}
    for name in _RANK_VARIABLES:
        environment.pop(name, None)  # the launcher sets them, and by them its processes are known
    cores = len(os.sched_getaffinity(0))
    if order["processes"] > 1:  # a process alone has all cores without it, and may then use fewer of them
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // order["processes"])))
    return environment


def _pass_signals_on(command: subprocess.Popen[bytes]) -> bool:
    """Return when the command has ended (False) or stdin has (True)."""
    pending = b""
    while command.poll() is None:
        if not select.select([sys.stdin.fileno()], [], [], _POLL_S)[0]:
            continue
        received = os.read(sys.stdin.fileno(), 4096)
        if not received:
            return True
        *lines, pending = (pending + received).split(b"\n")
        for name in lines:
            _send(command.pid, signal.Signals[name.decode()])
    return False


def _send(session: int, number: signal.Signals) -> None:
    """Send a signal to the processes of the run, or to the whole session before they are there and where it must kill.

    The launcher between is spared: it would give its processes the signal one after another, and kill them after 30 s.
    """
    members = _members(session)
    ranks = [pid for pid, parent in members.items() if _is_rank(pid) and not _is_rank(parent)]
    for pid in members if number == signal.SIGKILL or not ranks else ranks:
        with suppress(ProcessLookupError):  # it has ended since
            os.kill(pid, number)


def _end(session: int, grace_s: float) -> None:
    _send(session, signal.SIGTERM)
    if _wait_until_empty(session, grace_s):
        _send(session, signal.SIGKILL)
        _wait_until_empty(session, grace_s)


def _wait_until_empty(session: int, timeout_s: float) -> int:
    """Return how many processes of the session are left when it is empty or the time is up."""
    deadline = time.monotonic() + timeout_s
    while (left := len(_members(session))) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return left


def _members(session: int) -> dict[int, int]:
    """Return the parent of each process of the session that has not ended."""
    members = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text()
        except OSError:
            continue  # it has ended since
        # The name, in parentheses, may hold spaces; behind it: state, parent, process group, session.
        state, parent, _, its_session = stat[stat.rindex(")") + 2 :].split()[:4]
        if int(its_session) == session and state != "Z":
            members[int(folder.name)] = int(parent)
    return members


def _is_rank(pid: int) -> bool:
    """Return whether a launcher told this process its place in the run, or it was started by one that was told."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    names = {variable.partition(b"=")[0].decode(errors="replace") for variable in variables}
    return names.issuperset(_RANK_VARIABLES)


if __name__ == "__main__":
    sys.exit(main())
