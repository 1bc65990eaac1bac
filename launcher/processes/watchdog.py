"""Who hangs, and where: a thread in each process that watches its main thread and tells the others that it lives.

Each process writes what it is doing to a file of its own in `log/heartbeats` of the run directory. The store of the process
groups would not do: it is kept by the main process, and who asks it while that is stopped waits for ever.
"""

import faulthandler
import json
import linecache
import logging
import os
import platform
import shutil
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from ...kernels.errors import RefusedError, refused
from . import console
from .agreement import agreed
from .rank_status import write_status
from .signals import StopRequest
from .topology import Topology
from .words import rank_list

_LOG = logging.getLogger(__name__)

# Phases that may take as long as they like, as long as every process lives: hours of tokenising, gigabytes to a slow disk.
_UNLIMITED = frozenset({"start", "prepare", "save"})
# States of a process for which another one in such a phase waits in vain. Before the first step nobody may end alone, not even
# without an error; after the last one the main process may still remove checkpoints.
_OVER = {"start": ("stuck", "failed", "left", "ended"), "save": ("stuck", "failed")}
_OVER["prepare"] = _OVER["start"]
_LONGEST_INTERVAL_S = 5.0
_INTERVALS_PER_TIMEOUT = 20
_LOST_AFTER = 4  # intervals without a word
_BYTES = 1024  # of a heartbeat's file: overwritten in place, which needs no space on a full disk
_SLOW_FACTOR, _SLOW_SHARE = 2.0, 0.2  # of the others' own time in a step, and of the whole step
_FEWEST_STEPS = 10  # that a process is called slow for
_C10D = "distributed_c10d.py"
_COMMUNICATION = (f"{os.sep}torch{os.sep}distributed{os.sep}", f"{os.sep}deepspeed{os.sep}comm{os.sep}")
_OWN_THREADS = ("watchdog", "checkpoint", "loader")
EXIT_STATUS = 1


class LostProcessError(RefusedError):
    """Another process of the run has ended or does not answer; the text says which, and where it was."""


@dataclass
class Heartbeat:
    """What a process says of itself in its file."""

    rank: int
    host: str
    pid: int
    beat: int = 0
    """A count that rises while the process lives."""
    state: str = "running"
    """running; stuck, by its watchdog; failed; left, because another process did; ended."""
    step: int = 0
    phase: str = "start"
    phase_s: float = 0.0
    """For how long its main thread has been in that phase."""
    where: str = ""
    """The collective that a stuck process waits in, or its innermost line."""
    signal: int = 0
    """The number of the signal that asked the process to stop; 0 if none did."""
    steps: int = 0
    """The steps that the process has trained since it started. They took step_s, of which own_s was not spent waiting for
    other processes."""
    step_s: float = 0.0
    own_s: float = 0.0


def collective_timeout_s(hang_timeout_s: float) -> float:
    """Return how long collectives wait: a little longer than the watchdog, which can say more."""
    return 1.25 * hang_timeout_s + 5


class Watchdog:
    """A context in which a hang of any process ends them all, with their stacks in the log and a summary on the console.

    Every process makes one and says with `at` what it does. It watches from `start` on, and in a run of one process nothing.
    """

    def __init__(self, topology: Topology, hang_timeout_s: float, stop: StopRequest) -> None:
        self._topology, self._timeout_s, self._stop = topology, hang_timeout_s, stop
        self._interval_s = min(_LONGEST_INTERVAL_S, hang_timeout_s / _INTERVALS_PER_TIMEOUT)
        # All that follows takes its time too, and when the timeout is over all should have ended.
        self._patience_s = hang_timeout_s - (_LOST_AFTER + 2) * self._interval_s
        self._own_phases: tuple[str, ...] = ("data",)
        self._says = Heartbeat(topology.rank, platform.node(), os.getpid())
        self._since = time.monotonic()  # in the phase
        self._times: defaultdict[str, float] = defaultdict(float)
        self._main_thread = threading.get_ident()
        self._heard: dict[int, tuple[int, float]] = {}  # by rank, the last beat and when it was new
        self._slow = _SlowProcesses()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def at(self, phase: str, step: int | None = None) -> None:
        """Note what the main thread does from now on, and, once per step, in which step."""
        now = time.monotonic()
        self._times[self._says.phase] += now - self._since
        self._says.phase, self._since = phase, now
        if step is not None:
            self._says.steps += 1
            self._says.step = step

    def start(self, folder: Path, *, forward_is_own: bool) -> None:
        """Begin to watch; all processes come here.

        folder: `log` of the run directory. forward_is_own: whether the forward pass waits for no other process, so that its
        time tells the slow from the quick.
        """
        if self._topology.world_size == 1:
            return
        if forward_is_own:
            self._own_phases = ("data", "forward")
        self._folder, heartbeats = folder, folder / "heartbeats"

        def make_folder() -> None:
            shutil.rmtree(heartbeats, ignore_errors=True)  # of a start before this one
            with refused(f"cannot make {heartbeats}", "free space there, or make it writable"):
                heartbeats.mkdir()

        def open_files() -> None:
            with refused(f"cannot write into {folder}", "free space there, or make it writable"):
                self._file = (heartbeats / f"rank{self._topology.rank}.json").open("wb", buffering=0)
                # Held open: on a full disk the watchdog must still be able to say what it saw.
                self._log = (folder / f"rank{self._topology.rank}.log").open("ab", buffering=0)

        agreed(self._topology, make_folder if self._topology.is_main else None)
        agreed(self._topology, open_files)
        self._write()
        self._thread.start()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Raise LostProcessError in place of the error that the end of another process caused."""
        if not self._thread.is_alive():
            return
        lost = self._lost() if error is not None and _is_peer_error(error) else ""
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._says.state = "ended" if error is None else "left" if lost else "failed"
        self._write()
        self._file.close()
        self._log.close()
        if lost:
            raise LostProcessError(lost) from error

    def _watch(self) -> None:
        while not self._ended.wait(self._interval_s):
            self._write()
            # Without Python's lock: this thread cannot run while another one keeps it.
            faulthandler.dump_traceback_later(2 * self._timeout_s + 10, exit=True, file=self._log)
            reason = self._reason_to_give_up()
            if reason and not self._ended.is_set():
                self._give_up(reason)
            elif self._topology.is_main and not self._ended.is_set():
                for text in self._slow.news({0: self._own(), **self._others()}):
                    _LOG.warning(text)
                    console.write_now(f"warning: {text}\n")

    def _reason_to_give_up(self) -> str:
        """Return what is wrong, empty if nothing is."""
        setting = f"(reliability.hang_timeout_s is {self._timeout_s:g})"
        waited_s = time.monotonic() - self._since
        if self._says.phase in _UNLIMITED:
            others = self._others()
            self._pass_a_signal_on(others)
            for rank, beat in others.items():
                silence_s = self._silence_s(rank, beat)
                if beat.state in _OVER[self._says.phase] and silence_s > _LOST_AFTER * self._interval_s:
                    return f"rank {rank} has left the run alone"
                if silence_s > self._patience_s:
                    return f"rank {rank} has not been heard of for {self._patience_s:.1f} s {setting}"
            return ""
        if waited_s > self._patience_s:
            return f"no progress for {waited_s:.1f} s {setting}"
        if waited_s > _LOST_AFTER * self._interval_s:
            for rank, beat in self._others().items():
                if beat.state in ("stuck", "failed"):
                    return f"rank {rank} has given up"
        return ""

    def _pass_a_signal_on(self, others: Mapping[int, Heartbeat]) -> None:
        """Signal this process too while data are prepared: the others wait for one, which alone can end that."""
        told = next((beat.signal for beat in others.values() if beat.signal), 0)
        if told and self._says.phase == "prepare" and self._stop.received is None:
            os.kill(os.getpid(), told)

    def _give_up(self, reason: str) -> None:
        """End this process with its stack in the log. The first process that still lives prints where all of them are."""
        self._says.where, self._says.state = self._place(), "stuck"
        self._write()
        with suppress(OSError):
            self._log.write(f"\ngiving up: {reason}; all stacks of this process:\n".encode())
            faulthandler.dump_traceback(self._log, all_threads=True)
        time.sleep(_LOST_AFTER * self._interval_s)  # for the others to find the same
        self._write()
        time.sleep(self._interval_s)
        beats = self._others()
        text = self._summary(reason, beats)
        with suppress(OSError):
            self._log.write(text.encode())
        living = [rank for rank, beat in beats.items() if self._lives(rank, beat)]
        if self._topology.rank < min(living, default=self._topology.world_size):
            console.write_now(text)
        write_status(EXIT_STATUS, text)
        os._exit(EXIT_STATUS)  # the main thread waits in a collective, and would for ever

    def _summary(self, reason: str, others: Mapping[int, Heartbeat]) -> str:
        beats = {**others, self._topology.rank: self._own()}
        lost = [rank for rank, beat in others.items() if not self._lives(rank, beat)]
        lost += [rank for rank in range(self._topology.world_size) if rank not in beats]
        busy = [rank for rank, beat in beats.items() if rank not in lost and not beat.where.startswith("waits in ")]
        lines = [f"the run hangs: {reason}"]
        for rank, beat in sorted(beats.items()):
            state = "is silent" if rank in lost else beat.where or "is running"
            place = f"step {beat.step:,}, {beat.phase} for {beat.phase_s:.1f} s, {state}"
            lines.append(f"  rank {rank} on {beat.host} (pid {beat.pid}): {place}")
        if lost:
            lines.append(_lost_text(sorted(lost), beats))
        elif busy and len(busy) < len(beats):
            lines.append(f"the others wait for {rank_list(busy)}")
        lines.append(f"the stacks of all threads are in {self._folder}/rank*.log")
        return "\n".join(lines) + "\n"

    def _lost(self) -> str:
        """Return which processes do not live any more, after time enough to hear of them."""
        first = self._others()
        time.sleep(_LOST_AFTER * self._interval_s)
        later = self._others()

        def is_silent(rank: int) -> bool:
            return later[rank].state == "running" and rank in first and first[rank].beat == later[rank].beat

        lost = [
            rank
            for rank in range(self._topology.world_size)
            if rank != self._topology.rank and (rank not in later or later[rank].state == "failed" or is_silent(rank))
        ]
        return _lost_text(lost, later)

    def _place(self) -> str:
        """Return the collective that some thread waits in, or the innermost line of the main thread."""
        frames = sys._current_frames()
        skipped = {thread.ident for thread in threading.enumerate() if thread.name.startswith(_OWN_THREADS)}
        order = [self._main_thread, *(ident for ident in frames if ident not in {self._main_thread, *skipped})]
        for ident in order:
            place = _collective(frames.get(ident))
            if place:
                return place
        inner = frames[self._main_thread]
        return f"is in {inner.f_code.co_name} ({_short(inner)})"

    def _own(self) -> Heartbeat:
        return replace(
            self._says,
            phase_s=round(time.monotonic() - self._since, 1),
            signal=int(self._stop.received or 0),
            step_s=round(sum(self._times[name] for name in self._times if name not in _UNLIMITED), 4),
            own_s=round(sum(self._times[name] for name in self._own_phases), 4),
        )

    def _write(self) -> None:
        self._says.beat += 1
        text = json.dumps(asdict(self._own())).encode()
        with suppress(OSError):  # the others look at it only when something is wrong
            os.pwrite(self._file.fileno(), text.ljust(_BYTES), 0)
            os.fsync(self._file.fileno())

    def _others(self) -> dict[int, Heartbeat]:
        """Return the heartbeats of the other processes, by rank, as far as they can be read."""
        beats = {}
        for rank in range(self._topology.world_size):
            if rank != self._topology.rank:
                with suppress(OSError, ValueError, TypeError):
                    text = (self._folder / "heartbeats" / f"rank{rank}.json").read_text(encoding="utf-8")
                    beats[rank] = Heartbeat(**json.loads(text))
                    self._silence_s(rank, beats[rank])
        return beats

    def _silence_s(self, rank: int, beat: Heartbeat) -> float:
        """Time since that beat was first seen."""
        now = time.monotonic()
        if self._heard.get(rank, (0, 0.0))[0] != beat.beat:
            self._heard[rank] = (beat.beat, now)
        return now - self._heard[rank][1]

    def _lives(self, rank: int, beat: Heartbeat) -> bool:
        return beat.state == "stuck" or self._silence_s(rank, beat) < (_LOST_AFTER - 1) * self._interval_s


class _SlowProcesses:
    """Warn once of each process whose own part of a step takes much longer than that of the others."""

    def __init__(self) -> None:
        self._before: dict[int, Heartbeat] = {}
        self._told: set[int] = set()

    def news(self, beats: Mapping[int, Heartbeat]) -> list[str]:
        """Return sentences on the processes that became slow since the last call."""
        if any(beat.steps < self._before.get(rank, beat).steps + _FEWEST_STEPS for rank, beat in beats.items()):
            self._before = {**beats, **self._before}
            return []
        before, self._before = self._before, dict(beats)
        steps = {rank: beat.steps - before[rank].steps for rank, beat in beats.items()}
        own_s = {rank: (beat.own_s - before[rank].own_s) / steps[rank] for rank, beat in beats.items()}
        slow = {}
        for rank, beat in beats.items():
            usual_s = statistics.median(seconds for other, seconds in own_s.items() if other != rank)
            step_s = (beat.step_s - before[rank].step_s) / steps[rank]
            if own_s[rank] > _SLOW_FACTOR * usual_s and own_s[rank] - usual_s > _SLOW_SHARE * step_s:
                slow[rank] = (
                    f"rank {rank} on {beat.host} is slow: it needs {own_s[rank]:.3f} s of a step of {step_s:.3f} s for its "
                    f"data and its forward pass, the others {usual_s:.3f} s, and they wait for it"
                )
        told, self._told = self._told, set(slow)
        return [text for rank, text in slow.items() if rank not in told]


def _collective(innermost: FrameType | None) -> str:
    """Return where a thread waits for other processes, empty if it does not."""
    if innermost is None:
        return ""
    frame: FrameType | None = innermost
    while frame is not None and not frame.f_code.co_filename.endswith(_C10D):
        frame = frame.f_back
    if frame is None:  # one that was begun before, and is only waited for here
        line = linecache.getline(innermost.f_code.co_filename, innermost.f_lineno)
        return f"waits in {innermost.f_code.co_name} ({_short(innermost)})" if ".wait(" in line else ""
    name = frame.f_code.co_name
    while frame.f_back is not None and any(part in frame.f_code.co_filename for part in _COMMUNICATION):
        frame = frame.f_back
    return f"waits in {name} ({_short(frame)})"


def _short(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{frame.f_lineno}"


def _is_peer_error(error: BaseException) -> bool:
    """Return whether a collective failed because of another process: gloo has no error class of its own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _lost_text(ranks: list[int], beats: Mapping[int, Heartbeat]) -> str:
    """Return which processes are gone, empty if none is."""
    texts = []
    for rank in ranks:
        beat = beats.get(rank)
        if beat is None:
            texts.append(f"rank {rank} has never been heard of")
            continue
        end = "failed" if beat.state == "failed" else "was killed or stopped from outside, or its machine is gone"
        last = f"last heard of at step {beat.step:,} ({beat.phase})"
        texts.append(f"rank {rank} on {beat.host} (pid {beat.pid}) {end}: {last}")
    return "; ".join(texts)
