"""What another program on one core costs a run on a CPU, against a plain torch model of the same shape, in turns.

  python scripts/bench/bench_busy.py --rounds 3

Ours is the command `xformer-train`, at the shapes of bench_small_step.py in fp32, on the text inside the Python interpreter.
The plain model takes the same steps on batches of random tokens. Each is a process of its own that stands still while it is not
measured, first with all cores free, then beside a program that never rests. Nothing says how many threads they have.

Prints sequences/s as medians over the rounds, how many times slower a busy core makes each, and both as a ratio.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench_device import machine_line
from bench_small_step import SHAPES, random_batches, theirs

from xformer_train.launcher.config.loading import load_config

_SETTLE_S = 1.5  # from a change on until it is measured
_START_S = 300.0
_LEAST_ROWS = 5
_OTHER_PROGRAM = "while True: pass"
_USERS_CHOICE = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["nanogpt"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of one measurement")
    parser.add_argument(
        "--plain", type=Path, help=argparse.SUPPRESS
    )  # take steps, and write a line to this file after each
    arguments = parser.parse_args()
    if arguments.plain is not None:
        take_plain_steps(arguments.shapes[0], arguments.plain)
        return
    for shape in arguments.shapes:
        with tempfile.TemporaryDirectory() as folder:
            print(table(shape, measured(shape, Path(folder), arguments.rounds, arguments.seconds)), flush=True)


def take_plain_steps(shape: str, log: Path) -> None:
    """Take steps of the plain model for ever, and write a line after each."""
    path, sets, symbols, plain = SHAPES[shape]
    config = load_config(path, sets).config
    data = random_batches(config, symbols)
    take = theirs(config, plain(config, symbols), "fp32", data)
    with log.open("w", buffering=1, encoding="ascii") as lines:
        for index in range(10**9):
            take(index)
            lines.write(f"{index}\n")


def measured(shape: str, folder: Path, rounds: int, seconds: float) -> dict[str, tuple[list[float], list[float]]]:
    """Return sequences/s of each program in each round, with the cores free and with one busy."""
    path, sets, *_ = SHAPES[shape]
    config = load_config(path, sets).config
    changes = [*sets, "name=ours", f"output_dir={folder}", "training.max_steps=1000000", "logging.every_steps=1"]
    changes += ["training.precision=fp32", "eval.every_steps=null", "checkpoint.save_every_steps=null"]
    ours = [sys.executable, "-m", "xformer_train", "--config", path, *(f"--set={change}" for change in changes)]
    plain = [sys.executable, __file__, "--shapes", shape, "--plain", str(folder / "plain.txt")]
    rates: dict[str, tuple[list[float], list[float]]] = {"ours": ([], []), "plain": ([], [])}
    with (
        standing_still(ours, folder / "ours" / "metrics.jsonl") as our_process,
        standing_still(plain, folder / "plain.txt") as plain_process,
    ):
        for _ in range(rounds):
            for name, (process, log) in {"ours": our_process, "plain": plain_process}.items():
                process.send_signal(signal.SIGCONT)
                rates[name][0].append(config.training.train_batch_size * steps_per_s(log, seconds))
                other = subprocess.Popen([sys.executable, "-c", _OTHER_PROGRAM])
                try:
                    rates[name][1].append(config.training.train_batch_size * steps_per_s(log, seconds))
                finally:
                    other.kill()
                    other.wait()
                process.send_signal(signal.SIGSTOP)
    return rates


@contextmanager
def standing_still(command: list[str], log: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Start a program that writes a line after each step, let it take a few, and stop it; end it on leaving."""
    environment = {name: value for name, value in os.environ.items() if name not in _USERS_CHOICE}
    with (log.parent.parent / f"{log.stem}.out").open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline_s = time.monotonic() + _START_S
        while not log.exists() or rows_of(log) < _LEAST_ROWS:
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"{' '.join(command)} took no steps: {Path(output.name).read_text()[-2000:]}")
            time.sleep(0.1)
        process.send_signal(signal.SIGSTOP)
        yield process, log
    finally:
        process.kill()
        process.wait()


def steps_per_s(log: Path, seconds: float) -> float:
    """Return the steps per second that a program takes now, from a step's end to another's."""
    time.sleep(_SETTLE_S)
    first, started_s = next_row(log)
    time.sleep(seconds)
    last, ended_s = next_row(log)
    return (last - first) / (ended_s - started_s)


def next_row(log: Path) -> tuple[int, float]:
    """Return the number of rows once there is one more, and that time."""
    before = rows_of(log)
    while (rows := rows_of(log)) == before:
        time.sleep(0.002)
    return rows, time.monotonic()


def rows_of(log: Path) -> int:
    return log.read_bytes().count(b"\n")


def table(shape: str, rates: dict[str, tuple[list[float], list[float]]]) -> str:
    """Return the figures for a person."""
    lines = [f"{shape}, {machine_line()}", f"{'sequences/s':12}{'free':>9}{'one busy':>10}{'slower':>9}"]
    medians = {name: [statistics.median(row) for row in pair] for name, pair in rates.items()}
    for name, (free, busy) in medians.items():
        lines.append(f"{name:12}{free:9.0f}{busy:10.0f}{free / busy:8.2f}x")
    ratios = [ours / plain for ours, plain in zip(medians["ours"], medians["plain"], strict=True)]
    lines.append(f"{'ours / plain':12}{ratios[0]:9.2f}{ratios[1]:10.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
