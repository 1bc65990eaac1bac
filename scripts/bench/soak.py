"""Kills training again and again and checks that nothing is lost: `python scripts/bench/soak.py --kills 100`.

A tiny run on the CPU is killed with SIGKILL at random moments, half of them while it saves, and resumed each time, until it
reaches its last step; then the next run begins. What is checked:
    each start goes on from the newest checkpoint that was complete when the run was killed, and finds nothing damaged;
    each loss that was logged equals that of an uninterrupted run, bit for bit;
    each checkpoint that was ever complete is there at the end, and whole.
Prints a table and, as its last line, the same in JSON. The exit status is 1 if a check failed.
"""

import argparse
import json
import os
import platform
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import yaml

from xformer_train.launcher.checkpoint import store
from xformer_train.launcher.config.loading import load_config
from xformer_train.launcher.processes.topology import quiet
from xformer_train.launcher.training.train import run

STEPS, SAVE_EVERY = 200, 4
CONFIG = {
    "data": {"max_seq_length": 32},
    "model": {
        "type": "gpt",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
        "hidden_act": "gelu_tanh",
    },
    "tokenizer": {"type": "bytes"},
    "objective": {"type": "clm"},
    "training": {"train_batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": STEPS, "precision": "fp32"},
    "logging": {"every_steps": 1, "tensorboard": False},
    "checkpoint": {"save_every_steps": SAVE_EVERY, "keep_last": None},
    "reliability": {"hang_timeout_s": 20},
}
WHILE_STARTING = 0.2  # share of the kills outside of saves that may come before the first step
LONGEST_S = 600  # that any wait for a run may take


@dataclass
class Report:
    """What happened."""

    kills: int = 0
    inside_a_save: int = 0
    moments: dict[str, int] = field(default_factory=dict)
    """Kills by what the run was doing, or had written of a checkpoint."""
    resumes: int = 0
    """Starts that loaded a checkpoint."""
    runs: int = 0
    losses_compared: int = 0
    checkpoints: int = 0
    save_s: float = 0.05
    """A running mean of how long saves take, seen from outside; kills inside of one are spread over so long."""
    faults: list[str] = field(default_factory=list)


class Attempt:
    """A start of the run: its processes, forked from this one, so that nothing has to be imported anew."""

    def __init__(self, config: Path, name: str, folder: Path, processes: int) -> None:
        self.output = folder / f"{time.time_ns()}.out"
        self.output.touch()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pids = [self._fork(config, name, rank, processes, port) for rank in range(processes)]
        self.statuses: dict[int, int] = {}

    def _fork(self, config: Path, name: str, rank: int, processes: int, port: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            file = os.open(self.output if rank == 0 else os.devnull, os.O_WRONLY)
            os.dup2(file, 1)
            os.dup2(file, 2)
            if processes > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            status = run(load_config(config, [f"name={name}"], world_size=processes), resume=True)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(status)

    def ended(self) -> bool:
        """Whether all processes have ended, without waiting."""
        for pid in self.pids:
            if pid not in self.statuses and os.waitpid(pid, os.WNOHANG)[0]:
                self.statuses[pid] = 0
        return len(self.statuses) == len(self.pids)

    def trains(self) -> bool:
        """Whether the report at its start is printed."""
        return "start      " in self.output.read_text()

    def stop_one(self, generator: random.Random) -> int:
        """Stops one process, which is then killed or goes on; its id."""
        pid = generator.choice([pid for pid in self.pids if pid not in self.statuses])
        os.kill(pid, signal.SIGSTOP)
        return pid

    def kill(self, pid: int) -> None:
        """Kills one process; the others must end by themselves."""
        os.kill(pid, signal.SIGKILL)
        wait_until(self.ended)


def wait_until(holds: Callable[[], object], poll_s: float = 0.0005) -> None:
    """Raises TimeoutError if it takes longer than anything here should."""
    deadline = time.monotonic() + LONGEST_S
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited for {LONGEST_S} s")
        time.sleep(poll_s)


def logged(run_dir: Path) -> dict[int, float]:
    """Loss by step, as far as lines are whole."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return {}
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return {row["step"]: row["loss"] for row in map(json.loads, lines)}


def unfinished(checkpoints: Path) -> Iterator[Path]:
    return checkpoints.glob(".step*.tmp")


def changed_ns(folder: Path) -> int:
    """When something was last made in a folder; 0 if it is gone."""
    try:
        return folder.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def moment(checkpoints: Path, begun_ns: int) -> str:
    """What the kill left of a save that began after that time; empty if it was in none."""
    for folder in unfinished(checkpoints):
        if changed_ns(folder) < begun_ns:
            continue
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if not names:
            return "empty folder"
        tensors = [name for name in names if name.endswith(".pt")]
        if (folder / "state.json").exists() and (folder / "state.json").stat().st_size > 10:
            return "sealed, not renamed"
        return "files being written" if tensors else "before the first file"
    newest = next((entry.id for entry in reversed(store.entries(checkpoints)) if entry.state is not None), "")
    fresh = newest != store.latest_id(checkpoints) and changed_ns(checkpoints / newest) > begun_ns
    return "renamed, latest not moved" if fresh else ""


def soak(folder: Path, kills: int, seconds: float, processes: int, generator: random.Random) -> Report:
    """Runs and kills until there were so many kills, or the time is up."""
    report = Report()
    config = folder / "soak.yaml"
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"{generator.getrandbits(400):x}" for _ in range(400)))
    sources = {"sources": [{"kind": "text", "path": str(text)}], "cache_dir": str(folder / "cache")}
    config.write_text(yaml.safe_dump({**CONFIG, "data": CONFIG["data"] | sources, "output_dir": str(folder / "runs")}))

    started_s = time.monotonic()
    straight = Attempt(config, "straight", folder, processes)
    wait_until(straight.ended)
    expected = logged(folder / "runs" / "straight")
    assert sorted(expected) == list(range(1, STEPS + 1)), straight.output.read_text()
    run_s = time.monotonic() - started_s
    while report.kills < kills and time.monotonic() - started_s < seconds:
        report.runs += 1
        _one_run(config, f"run{report.runs}", processes, kills, expected, run_s, generator, report)
    return report


def _one_run(
    config: Path,
    name: str,
    processes: int,
    kills: int,
    expected: dict[int, float],
    run_s: float,
    generator: random.Random,
    report: Report,
) -> None:
    """A run from its first start to its last step."""
    run_dir = config.parent / "runs" / name
    checkpoints = run_dir / "checkpoints"
    seen: set[str] = set()
    while True:
        newest = max(seen, default=None)
        attempt = Attempt(config, name, config.parent, processes)
        killed = report.kills < kills and _kill(attempt, run_dir, run_s, generator, report)
        if not killed:
            wait_until(attempt.ended)
        output = attempt.output.read_text()
        if newest is not None and attempt.trains():
            report.resumes += 1
            if f"{checkpoints}/{newest}" not in output or "damaged" in output:
                report.faults.append(f"{name} did not go on from {newest}: {output[-500:]}")
        losses = logged(run_dir)
        wrong = [step for step, loss in losses.items() if loss != expected[step]]
        report.losses_compared += len(losses)
        if wrong:
            report.faults.append(f"{name} has other losses at steps {wrong}")
        there = {entry.id for entry in store.entries(checkpoints) if entry.state is not None}
        lost = seen - there
        if lost:
            report.faults.append(f"{name} lost {sorted(lost)}")
        seen |= there
        if not killed:
            break
    if sorted(losses) != sorted(expected):
        report.faults.append(f"{name} ended after step {max(losses, default=0)}: {output[-500:]}")
    for checkpoint_id in sorted(seen):
        report.checkpoints += 1
        problems = store.problems_of(checkpoints / checkpoint_id)
        if problems:
            report.faults.append(f"{name}: {checkpoint_id} is damaged: {problems}")


def _kill(attempt: Attempt, run_dir: Path, run_s: float, generator: random.Random, report: Report) -> bool:
    """Kills a process of the attempt, in a save where there were fewer of those; False if the attempt ended before."""
    checkpoints = run_dir / "checkpoints"
    begun_ns = time.time_ns()

    def saving() -> bool:
        """Whether a save of this attempt is in progress; folders of those before it lie there too."""
        return any(changed_ns(path) > begun_ns for path in unfinished(checkpoints))

    in_a_save = 2 * report.inside_a_save <= report.kills
    if in_a_save:
        for _ in range(generator.randint(0, 3)):  # saves that come to their end first
            wait_until(lambda: attempt.ended() or saving())
            started_s = time.monotonic()
            wait_until(lambda: attempt.ended() or not saving())
            report.save_s = round((report.save_s + time.monotonic() - started_s) / 2, 4)
    else:
        if generator.random() > WHILE_STARTING:
            wait_until(lambda: attempt.ended() or attempt.trains())
        until_s = time.monotonic() + generator.uniform(0, run_s / 3)
        wait_until(lambda: attempt.ended() or time.monotonic() > until_s)
    while True:
        if in_a_save:
            wait_until(lambda: attempt.ended() or saving())
            time.sleep(generator.uniform(0, report.save_s))
        if attempt.ended():
            return False
        victim = attempt.stop_one(generator)
        if not in_a_save or saving():
            break
        os.kill(victim, signal.SIGCONT)  # the save was over before
    attempt.kill(victim)
    report.kills += 1
    what = moment(checkpoints, begun_ns)
    report.inside_a_save += bool(what)
    what = what or ("between saves" if attempt.trains() else "while starting")
    report.moments[what] = report.moments.get(what, 0) + 1
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no further run after this time")
    parser.add_argument("--processes", type=int, default=1, help="of the run, one of which is killed")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    quiet(debug=False)
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        seconds = 60 * options.minutes
        report = soak(Path(folder), options.kills, seconds, options.processes, random.Random(options.seed))
    facts = {
        **asdict(report),
        "processes": options.processes,
        "seconds": round(time.monotonic() - started_s),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: metadata.version(name) for name in ("torch", "deepspeed")},
    }
    for name, value in facts.items():
        print(f"{name:16} {value}")
    print(json.dumps(facts))
    return int(bool(report.faults))


if __name__ == "__main__":
    sys.exit(main())
