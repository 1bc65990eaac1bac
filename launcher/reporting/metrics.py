"""What a run measured: metrics.jsonl, TensorBoard and the console, all from one record."""

import json
import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...kernels.errors import UserError, refused
from ..processes import console
from ..processes.durable_files import replace_text
from ..processes.words import duration, number
from .record import StepRecord, rates_of, ratio
from .tensorboard import Boards

_LOG = logging.getLogger(__name__)
_LONG_S = 5.0  # without a line on the console
_ETA_RECORDS = 20  # records that the remaining time is judged by


class RunLog:
    """Write metrics.jsonl, tb/ and the console for the main process.

    run_dir: the run directory, which exists.
    end: the step at which the run ends, for progress and remaining time; or for a run that ends with its time, what returns the
    part of it that is over and the whole, in seconds.
    peak_flops: of all devices of the run together, per second; None where unknown, and then MFU is null and n/a.
    start_step, start_samples: where the run continues; rows and points of later steps, which a resumed run writes again,
    leave metrics.jsonl and the files of TensorBoard. hparams: the run config by dotted key, for TensorBoard.
    tokens_to_go: token positions that a run has to take after a step, by which its remaining time is judged; None where every
    step takes equally many.
    The console is a bar on stderr where that is a terminal, else one line per record on stdout.
    A full disk gives a warning, and training goes on: rows wait until there is space, TensorBoard gets no more points.
    Raises UserError if metrics.jsonl holds a line that is not JSON, other than a last one cut short.
    """

    def __init__(
        self,
        run_dir: Path,
        end: int | Callable[[], tuple[float, float]],
        *,
        peak_flops: float | None = None,
        start_step: int = 0,
        start_samples: int = 0,
        tensorboard: bool = True,
        hparams: Mapping[str, bool | int | float | str] | None = None,
        tokens_to_go: Callable[[int], int] | None = None,
    ) -> None:
        self._end, self._peak_flops, self._tokens_to_go = end, peak_flops, tokens_to_go
        self._recent: deque[StepRecord] = deque(maxlen=_ETA_RECORDS)
        self._beside_s, self._steps = 0.0, 0
        self._opened_s = time.monotonic()
        path = run_dir / "metrics.jsonl"
        with refused(f"cannot write {path}", "free space there, or make it writable"):
            if path.exists():  # replaced in one move, without rows of later steps and a last one that is cut short
                replace_text(path, "".join(line for own, line in rows(path) if own <= start_step))
            self._file = path.open("ab", buffering=0)  # so that what a full disk does not take is known
        self._unwritten = b""
        self._told_of_rows = False
        with refused(f"cannot write {run_dir / 'tb'}", "free space there, or set logging.tensorboard to false"):
            self._boards = Boards(run_dir / "tb", start_step, start_samples, hparams or {}) if tensorboard else None
        self._bar: tqdm | None = None
        if sys.stderr.isatty():
            form = "{percentage:3.0f}% |{bar:10}| {desc}"
            done, whole = self._done(start_step)
            self._bar = tqdm(total=whole, initial=done, bar_format=form, dynamic_ncols=True)

    def step_taken(self, step: int) -> None:
        """Move the bar on by a step, or say of a first step that took long that the run is under way."""
        first, self._steps = self._steps == 0, self._steps + 1
        self._on_bar(lambda bar: bar.update(self._done(step)[0] - bar.n))
        if self._bar is None and first and time.monotonic() - self._opened_s > _LONG_S:
            passed = duration(time.monotonic() - self._opened_s)
            console.say(f"{self._position(step)} | taken after {passed}")

    def passed_beside(self, seconds: float) -> None:
        """Count time of evaluations and saves, which the steps that remain will have too."""
        self._beside_s += seconds

    def evaluation_begins(self, step: int) -> None:
        """Say on a bar that an evaluation is under way."""
        self._on_bar(lambda bar: bar.set_description_str(f"{self._position(step)} | evaluating"))

    def log_step(self, record: StepRecord) -> None:
        """Write one row, one point per series and one line."""
        rates = rates_of(record, self._peak_flops)
        row: dict[str, Any] = {name: getattr(record, name) for name in ("step", "epoch", "samples", "loss")}
        row |= {
            **record.losses,
            "lr": record.lr,
            "grad_norm": record.grad_norm,
            **rates,
            "memory_gib": record.memory_gib,
        }
        if record.loss_scale is not None:
            row["loss_scale"] = record.loss_scale
        if record.loss_scale is not None or record.skipped_steps:
            row["skipped_steps"] = record.skipped_steps
        self._write_row(row)
        self._draw(lambda boards: boards.add_step(record, rates))
        self._recent.append(record)
        position, (done, whole) = self._position(record.step), self._done(record.step)
        fields = _console_fields(record, rates) | {"eta": f"eta {duration(self._time_left_s(record.step))}"}
        if self._bar is None:
            console.say(" | ".join([f"{position} {done / whole:.1%}", *fields.values()]))
        else:
            first = [fields.pop(name) for name in ("eta", "loss", "speed")]  # a narrow terminal cuts the rest
            self._bar.n = done
            self._on_bar(lambda bar: bar.set_description_str(" | ".join([position, *first, *fields.values()])))

    def _time_left_s(self, step: int) -> float:
        """Return what is left of the run's time, or what the steps to come will take if they go on as the last ones did."""
        done, whole = self._done(step)
        if not isinstance(self._end, int):
            return whole - done
        steps = self._end - step
        recent_s = sum(record.step_time_s for record in self._recent)
        if self._tokens_to_go is None:
            in_steps_s = steps * ratio(recent_s, sum(record.num_steps for record in self._recent))
        else:
            in_steps_s = self._tokens_to_go(step) * ratio(
                recent_s, sum(record.padded_tokens for record in self._recent)
            )
        return in_steps_s + steps * self._beside_s / max(1, self._steps)

    def say(self, step: int, text: str) -> None:
        """Write one line on the console, above the bar where there is one."""
        line = f"{self._position(step)} | {text}"
        if self._bar is None:
            console.say(line)
        self._on_bar(lambda bar: bar.write(line, file=sys.stderr))

    def log_evaluation(self, step: int, samples: int, losses: Mapping[str, float]) -> None:
        """Write one row, one point per series and one line for validation losses.

        losses: "loss", its parts by name, and "ema", the loss with the mean of the weights, if there is one.
        """
        self._write_row({"step": step, "samples": samples} | {f"val_{name}": value for name, value in losses.items()})
        self._draw(lambda boards: boards.add_evaluation(step, losses))
        parts = {name: value for name, value in losses.items() if name not in {"loss", "ema"}}
        of_mean = f" | ema {losses['ema']:.3f}" if "ema" in losses else ""
        self.say(step, f"held-out {_loss_text(losses['loss'], parts)}{of_mean}")

    def close(self) -> None:
        """Bring everything to the disk. The bar, if there is one, stays as it is."""
        self._write_rows()
        self._file.close()
        self._draw(Boards.close)
        self._on_bar(lambda bar: bar.close())

    def _position(self, step: int) -> str:
        return f"step {step:,}/{self._end:,}" if isinstance(self._end, int) else f"step {step:,}"

    def _done(self, step: int) -> tuple[float, float]:
        """Return how far the run is at a step, and how far it goes: in steps, or in seconds where it ends with its time."""
        if isinstance(self._end, int):
            return step, self._end
        spent_s, limit_s = self._end()
        return min(spent_s, limit_s), limit_s

    def _on_bar(self, change: Callable[[tqdm], Any]) -> None:
        if self._bar is not None:
            with console.surviving(sys.stderr):
                change(self._bar)

    def _write_row(self, row: dict[str, Any]) -> None:
        # JSON has no NaN.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._unwritten += json.dumps(finite).encode() + b"\n"
        self._write_rows()

    def _write_rows(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
            self._told_of_rows = False
        except OSError as error:
            if not self._told_of_rows:
                why = f"{error.strerror}; free space there, and they are written later"
                console.warn(f"{self._file.name} takes no more rows: {why}", _LOG)
            self._told_of_rows = True

    def _draw(self, draw: Callable[["Boards"], None]) -> None:
        if self._boards is None:
            return
        try:
            draw(self._boards)
        except OSError as error:  # which ends the thread that writes, so this writer is of no more use
            self._boards = None
            console.warn(f"TensorBoard gets no more points until the run is started again: {error.strerror}", _LOG)


def _console_fields(record: StepRecord, rates: Mapping[str, float | None]) -> dict[str, str]:
    """Return what the console says of a record, in order, without step and remaining time."""
    mfu = rates["mfu"]
    fields = {
        "epoch": f"epoch {record.epoch}",
        "loss": _loss_text(record.loss, record.losses),
        "lr": f"lr {record.lr:.2e}",
        "grad_norm": "gnorm n/a" if record.grad_norm is None else f"gnorm {record.grad_norm:.2f}",
    }
    scale = "" if record.loss_scale is None else f"scale {record.loss_scale:g} "
    if scale or record.skipped_steps:
        fields["skipped"] = f"{scale}skipped {record.skipped_steps}"
    fields["speed"] = f"{number(rates['seq_per_s'] or 0)} seq/s {number(rates['tokens_per_s'] or 0)} tok/s"
    if record.padded_tokens != record.real_tokens:
        fields["speed"] += f" (padded {number(rates['padded_tokens_per_s'] or 0)})"
    fields["mfu"] = "mfu n/a" if mfu is None else f"mfu {mfu:.1%}"
    if record.memory_gib is not None:
        fields["memory"] = f"mem {record.memory_gib:.1f} GiB"
    fields["data_wait"] = f"data {rates['data_wait_fraction'] or 0:.1%}"
    return fields


def _loss_text(loss: float, parts: Mapping[str, float]) -> str:
    """Return `loss 1.842 (mlm 1.80 nsp 0.04)`."""
    shown = " ".join(f"{name} {value:.2f}" for name, value in parts.items())
    return f"loss {loss:.3f}" + (f" ({shown})" if parts else "")


def rows(path: Path) -> list[tuple[int, str]]:
    """Return the step and the text of each row of metrics.jsonl, without blank lines and a last one cut short.

    Raises UserError if another line is no row, RefusedError if the file cannot be read.
    """
    with refused(f"cannot read {path}", "correct its permissions"):
        lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()  # the process was killed while writing it
    found = []
    for index, line in enumerate(lines, start=1):
        try:
            if line.strip():
                found.append((int(json.loads(line.decode())["step"]), line.decode()))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            what = f"not a row of metrics, got {repr(line.strip()[:80]).removeprefix('b')}"
            raise UserError(f"{path}:{index}: {what}; delete or repair that line") from error
    return found
