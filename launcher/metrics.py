"""What a run measured: metrics.jsonl, TensorBoard and the console, all from one record."""

import json
import logging
import math
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from .processes import console

_LOG = logging.getLogger(__name__)
_LOG.addHandler(logging.NullHandler())
_ETA_RECORDS = 20  # records that the remaining time is judged by


@dataclass(frozen=True)
class StepRecord:
    """The last of a window of steps, and sums over that window: all steps since the previous record.

    All counts are over all processes. loss, losses and the fields up to skipped_steps are those of the last step.
    """

    step: int
    """Steps completed since the start of training, this one included."""
    epoch: int
    samples: int
    """Sequences trained on since the start of training."""
    losses: Mapping[str, float]
    """Parts of the loss by name, such as mlm and nsp; empty where there is one part only."""
    loss: float
    lr: float
    grad_norm: float | None
    loss_scale: float | None
    """None unless fp16."""
    skipped_steps: int
    """Steps since the start of training that were left out because a gradient was not finite."""
    num_steps: int
    """Length of the window."""
    step_time_s: float
    """Wall time of the window, the wait for data included."""
    data_wait_s: float
    sequences: int
    real_tokens: int
    """Tokens that are not padding."""
    padded_tokens: int
    """Token positions computed on, padding included."""
    model_flops: float | None
    """Operations that forward and backward of the window need, without recomputation."""
    memory_gib: float | None
    """Most device memory allocated by one process so far; None on a CPU."""
    trust_ratios: Sequence[float] = field(default=())
    """LAMB: one per tensor."""


class RunLog:
    """Writer of metrics.jsonl, tb/ and the console for one process, rank 0; a context manager.

    run_dir: the run directory, which exists.
    max_steps: the step at which the run ends, for progress and remaining time.
    peak_flops: of all devices of the run together, per second; None where unknown, and then MFU is null and n/a.
    start_step, start_samples: where the run continues; rows and points of later steps, which a resumed run writes again,
    leave metrics.jsonl and the view of TensorBoard.
    The console is a bar on stderr where that is a terminal, else one line per record on stdout.
    A disk that takes nothing is told, and training goes on: rows wait until it does, TensorBoard ends with this writer.
    Raises ValueError if metrics.jsonl holds a line that is not JSON, other than a last one cut short.
    """

    def __init__(
        self,
        run_dir: Path,
        max_steps: int,
        *,
        peak_flops: float | None = None,
        start_step: int = 0,
        start_samples: int = 0,
        tensorboard: bool = True,
    ) -> None:
        self._max_steps = max_steps
        self._peak_flops = peak_flops
        self._recent: deque[tuple[int, float]] = deque(maxlen=_ETA_RECORDS)
        path = run_dir / "metrics.jsonl"
        _drop_rows_after(path, start_step)
        self._file = path.open("ab", buffering=0)  # so that what a full disk does not take is known
        self._unwritten = b""
        self._told_of_rows = False
        self._boards = _Boards(run_dir / "tb", start_step, start_samples) if tensorboard else None
        self._bar: tqdm | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=max_steps,
                initial=start_step,
                bar_format="{percentage:3.0f}% |{bar:10}| {desc}",
                dynamic_ncols=True,
            )

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def log_step(self, record: StepRecord) -> None:
        """Nothing; one row, one point per series, one line."""
        rates = _rates(record, self._peak_flops)
        row = {
            "step": record.step,
            "epoch": record.epoch,
            "samples": record.samples,
            "loss": record.loss,
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
        self._recent.append((record.num_steps, record.step_time_s))
        eta_s = (self._max_steps - record.step) * _ratio(
            sum(seconds for _, seconds in self._recent), sum(steps for steps, _ in self._recent)
        )
        position = f"step {record.step:,}/{self._max_steps:,}"
        fields = _console_fields(record, rates) | {"eta": f"eta {duration(eta_s)}"}
        if self._bar is None:
            share = f" {record.step / self._max_steps:.1%}"
            console.say(" | ".join([position + share, *fields.values()]))
        else:
            first = [fields.pop(name) for name in ("eta", "loss", "speed")]  # a narrow terminal cuts the rest
            self._bar.n = record.step
            with console.surviving(sys.stderr):
                self._bar.set_description_str(" | ".join([position, *first, *fields.values()]))

    def log_evaluation(self, step: int, samples: int, losses: Mapping[str, float]) -> None:
        """Nothing; one row, one point per series, one line for held-out losses: "loss", and its parts by name."""
        self._write_row({"step": step, "samples": samples} | {f"val_{name}": value for name, value in losses.items()})
        self._draw(lambda boards: boards.add_evaluation(step, losses))
        parts = {name: value for name, value in losses.items() if name != "loss"}
        line = f"step {step:,}/{self._max_steps:,} | held-out {_loss_text(losses['loss'], parts)}"
        if self._bar is None:
            console.say(line)
        else:
            with console.surviving(sys.stderr):
                self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        """Nothing; everything is on disk and the bar, if there is one, stays as it is."""
        self._write_rows()
        self._file.close()
        self._draw(_Boards.close)
        if self._bar is not None:
            with console.surviving(sys.stderr):
                self._bar.close()

    def _write_row(self, row: dict[str, Any]) -> None:
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
        }  # JSON has no NaN
        self._unwritten += json.dumps(finite).encode() + b"\n"
        self._write_rows()

    def _write_rows(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
            self._told_of_rows = False
        except OSError as error:
            if not self._told_of_rows:
                _tell(
                    f"{self._file.name} takes no more rows: {error.strerror}; free space there, and they are written later"
                )
            self._told_of_rows = True

    def _draw(self, draw: Callable[["_Boards"], None]) -> None:
        if self._boards is None:
            return
        try:
            draw(self._boards)
        except OSError as error:  # which ends the thread that writes, so this writer is of no more use
            self._boards = None
            _tell(f"TensorBoard gets no more points until the run is started again: {error.strerror}")


class _Boards:
    """TensorBoard series: by step in tb/, by samples in tb/samples/.

    A resumed writer hides what lies at or after its first x, whatever the tag, so series with another x need a writer of
    their own.
    """

    def __init__(self, directory: Path, start_step: int, start_samples: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # imports tensorboard, which takes seconds

        self._by_step = SummaryWriter(str(directory), purge_step=start_step + 1)
        self._by_samples = SummaryWriter(str(directory / "samples"), purge_step=start_samples + 1)

    def add_step(self, record: StepRecord, rates: Mapping[str, float | None]) -> None:
        self._by_samples.add_scalar("Train/Samples/train_loss", record.loss, record.samples)
        self._by_samples.add_scalar("Train/Samples/lr", record.lr, record.samples)
        series = {"loss": record.loss, **record.losses, "lr": record.lr, "grad_norm": record.grad_norm}
        series |= {"loss_scale": record.loss_scale, "memory_gib": record.memory_gib}
        for name, value in series.items():
            if value is not None:
                self._by_step.add_scalar(f"Train/{name}", value, record.step)
        for name, value in rates.items():
            if value is not None:
                self._by_step.add_scalar(f"Throughput/{name}", value, record.step)
        if record.trust_ratios:
            import numpy as np

            self._by_step.add_histogram("Train/lamb_coeffs", np.asarray(record.trust_ratios), record.step)
        self._flush()

    def add_evaluation(self, step: int, losses: Mapping[str, float]) -> None:
        for name, value in losses.items():
            self._by_step.add_scalar("Validation/Loss" if name == "loss" else f"Validation/{name}", value, step)
        self._flush()

    def close(self) -> None:
        self._by_step.close()
        self._by_samples.close()

    def _flush(self) -> None:
        """Nothing; all points are in the files, where the writers alone may hold them back for two minutes."""
        self._by_step.flush()
        self._by_samples.flush()


# Dense peaks in TFLOP/s, from NVIDIA's data sheets of V100, A100, L4, L40S, H100, H200 and HGX B200; where a sheet gives
# the figure with sparsity, half of it. fp32 is the rate without TF32. The first pattern found in the device name counts.
_PEAK_TFLOPS: list[tuple[str, dict[str, float]]] = [
    (r"V100S", {"fp32": 16.4, "fp16": 130}),
    (r"V100.*PCIE", {"fp32": 14, "fp16": 112}),
    (r"V100", {"fp32": 15.7, "fp16": 125}),
    (r"A100", {"fp32": 19.5, "fp16": 312, "bf16": 312}),
    (r"L40S", {"fp32": 91.6, "fp16": 362, "bf16": 362, "fp8": 733}),
    (r"L4", {"fp32": 30.3, "fp16": 121, "bf16": 121, "fp8": 242.5}),
    (r"H100.*PCIE", {"fp32": 51, "fp16": 756, "bf16": 756, "fp8": 1513}),
    (r"H[12]00.*NVL", {"fp32": 60, "fp16": 835.5, "bf16": 835.5, "fp8": 1670.5}),
    (r"H[12]00", {"fp32": 67, "fp16": 989, "bf16": 989, "fp8": 1979}),
    (r"B200", {"fp32": 75, "fp16": 2250, "bf16": 2250, "fp8": 4500}),
]


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Dense matrix-multiply peak of one device in FLOP/s; None for what is not in the table, and for a slice of a GPU (MIG).

    device_name: as torch.cuda.get_device_name() gives it. dtype: fp32, fp16, bf16 or fp8.
    """
    if re.search(r"\bMIG\b", device_name):
        return None
    for pattern, tflops in _PEAK_TFLOPS:
        if re.search(rf"\b{pattern}\b", device_name, re.IGNORECASE):
            return tflops[dtype] * 1e12 if dtype in tflops else None
    return None


def duration(seconds: float) -> str:
    """A time of at most two units: 48s, 3m20s, 5h12m, 2d04h."""
    if not math.isfinite(seconds):
        return "n/a"
    minutes, rest_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest_s:02}s" if minutes else f"{rest_s}s"


def number(value: float) -> str:
    """A count or rate with thousands separators, and a digit after the point only below 100."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.1f}"


def _rates(record: StepRecord, peak: float | None) -> dict[str, float | None]:
    """Throughput of the window, to six significant digits; mfu is None where the peak or the operations are unknown."""
    seconds = record.step_time_s
    rates: dict[str, float | None] = {
        "seq_per_s": _ratio(record.sequences, seconds),
        "tokens_per_s": _ratio(record.real_tokens, seconds),
        "padded_tokens_per_s": _ratio(record.padded_tokens, seconds),
        "mfu": None,
        "step_time_s": _ratio(seconds, record.num_steps),
        "data_wait_fraction": _ratio(record.data_wait_s, seconds),
    }
    if peak is not None and record.model_flops is not None:
        rates["mfu"] = _ratio(record.model_flops, seconds * peak)
    return {name: None if value is None else float(f"{value:.6g}") for name, value in rates.items()}


def _ratio(numerator: float, denominator: float) -> float:
    """Their quotient; NaN over zero, which is written as null."""
    return numerator / denominator if denominator else math.nan


def _console_fields(record: StepRecord, rates: Mapping[str, float | None]) -> dict[str, str]:
    """What the console says of a record, in order, without step and remaining time."""
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
    """`loss 1.842 (mlm 1.80 nsp 0.04)`."""
    return f"loss {loss:.3f}" + (
        f" ({' '.join(f'{name} {value:.2f}' for name, value in parts.items())})" if parts else ""
    )


def _tell(text: str) -> None:
    _LOG.warning(text)
    console.warn(text)


def _drop_rows_after(path: Path, step: int) -> None:
    """Nothing; rows of later steps, and a last row cut short, leave the file, which is replaced in one move."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # the process was killed while writing it
    kept = [line for number_, line in enumerate(lines, 1) if _step_of(line, f"{path}:{number_}") <= step]
    replacement = path.with_suffix(".jsonl.tmp")
    with replacement.open("w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    replacement.replace(path)


def _step_of(line: str, where: str) -> int:
    """The step of a row. Raises ValueError if the line is not one."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: not a row of metrics, got {line.strip()!r}; delete or repair that line") from error
