"""One training step of one transformer layer: ours against the others, side by side in one process.

Rows take turns, round by round, so that a busy or hot machine slows all of them alike; figures are medians over the rounds.
Every row of a shape has the same sequences and dropout. Before anything is timed, each of our rows is compared without
dropout with the written-out layer in higher precision; a wrong one is not timed, and the exit status is then 1. A row that
cannot be run is listed with the reason. Rows called emulated round as FP8 does and gain nothing. On a GPU the rows of torch
have the fastest of torch's attentions, which is named. A first interrupt (SIGINT, as of `timeout -s INT`) makes no more rows,
and measures those that are there.

The table of a shape is printed as soon as it is measured, and --out gets JSON lines, the machine first:
  fwd, bwd, both   ms, medians
  peak MiB         what a step takes from a GPU's memory besides parameters and input
  saved MiB        what forward keeps for backward, without parameters and output
  TFLOP/s          matrix products and attention, of padding too except unpadded, over the time of both
  roofline         the least time at the matrix and copy rates measured in this process, over the time of both; FP8 rows may
                   be above 100 %
  vs torch         how many times as fast as the written-out layer's row the row is
  vs compile       the same of torch.compile's row
  ours is          how many times as fast as the row our first one is
  error            of our rows without dropout, relative, in the output or the input gradient, whichever is larger
"""

import argparse
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bench_device import Ceilings, default_device, machine_line, measure_ceilings
from bench_rows import BASELINE, EMULATED, OURS, PLAIN, layer_rows, plain, plain_layer
from bench_steps import (
    GPU_INPUT_SETS,
    Inputs,
    Step,
    draw_inputs,
    make_step,
    peak_bytes,
    run_once,
    saved_bytes,
    time_steps,
)
from bench_task import CPU_SHAPES, GPU_SHAPES, SHAPES, Row, Shape, Task, UnavailableError, make_task
from bench_te_rows import TE, te_rows
from sdpa import AttentionShape, by_speed, preferring
from torch.nn.attention import SDPBackend, sdpa_kernel

WARMUP_ROUNDS = 2  # the first compiles, the second finds everything in place
INTERRUPTED = "interrupted before it was ready"


@dataclass(frozen=True)
class Settings:
    """What holds for all shapes of one call. rows: names of the only ones that are measured, None for all."""

    device: torch.device
    dtype: torch.dtype
    dropout: float
    rounds: int
    rows: Sequence[str] | None = None

    def wants(self, row: str) -> bool:
        """Return whether a row is measured; on a CPU the name of an FP8 row says besides that it is emulated."""
        return self.rows is None or row.removesuffix(EMULATED) in self.rows


@dataclass(frozen=True)
class Work:
    """What one step of a layer has to do at least."""

    matmul_flop: float
    attention_flop: float
    activation_bytes: float
    """One tensor (T, H)."""

    @property
    def flop(self) -> float:
        return self.matmul_flop + self.attention_flop

    def floor_s(self, ceilings: Ceilings) -> float:
        """The least time at these rates.

        On a GPU pointwise work and attention move 26 and 12 activations when everything that can be fused is; attention
        takes as long as the slower of its products and its memory. On a CPU the products alone count.
        """
        if ceilings.copy_bytes_per_s is None:
            return self.flop / ceilings.matmul_flop_per_s
        activation_s = self.activation_bytes / ceilings.copy_bytes_per_s
        attention_s = max(self.attention_flop / ceilings.matmul_flop_per_s, 12 * activation_s)
        return self.matmul_flop / ceilings.matmul_flop_per_s + attention_s + 26 * activation_s


def work_of(shape: Shape, dtype: torch.dtype, packed: bool) -> Work:
    """Forward and backward of the layer on all positions, or on the real tokens alone.

    Products: 24 T H^2 forward, twice that backward. Attention: 4 S^2 H for each sequence forward, 2.5 times that backward,
    which forms the scores again; half of it when causal.
    """
    size = shape.hidden_size
    lengths = shape.lengths().double() if packed else torch.full((shape.batch,), float(shape.length)).double()
    tokens, squares = lengths.sum().item(), lengths.square().sum().item()
    attention = 3.5 * 4 * squares * size / (2 if shape.causal else 1)
    return Work(3 * 24 * tokens * size**2, attention, dtype.itemsize * tokens * size)


def rows_of(task: Task) -> dict[str, Callable[[], Row]]:
    """How to make each row of the task, by name."""
    return te_rows(task) if task.shape.te_stages else layer_rows(task)


def is_ours(name: str) -> bool:
    """Whether a row is computed by our kernels."""
    return name.startswith((OURS, TE))


class Reference:
    """Output and input gradient of the written-out layer without dropout, in fp32, or fp64 for fp32 rows."""

    def __init__(self, task: Task) -> None:
        self._task = task.without_dropout()
        self._inputs = draw_inputs(task, 1)
        wider = torch.float64 if task.dtype == torch.float32 else torch.float32
        layer, bias = plain_layer(self._task).to(wider), task.additive_mask()
        x = self._inputs.x[0].to(wider).requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):  # the others may round to tf32 on a GPU
            y = layer(x, None if bias is None else bias.to(wider))
            (dx,) = torch.autograd.grad(y, x, self._inputs.dy[0].to(wider))
        self._exact = [result.detach()[task.key_mask].double() for result in (y, dx)]
        self._torchs = self._errors(plain(self._task))

    def _errors(self, row: Row) -> list[float]:
        results = run_once(make_step(row, self._inputs.of(row, self._task.key_mask)))
        real = (result if row.packed else result[self._task.key_mask] for result in results)
        return [
            ((ours.double() - exact).norm() / exact.norm()).item()
            for ours, exact in zip(real, self._exact, strict=True)
        ]

    def check(self, name: str) -> float:
        """The error of our row of this name. Raises ValueError if it is over twice torch's own and fp32 rounding.

        A row with an allowed error of its own is held to that.
        """
        row = rows_of(self._task)[name]()
        errors = self._errors(row)
        for error, torchs, what in zip(errors, self._torchs, ("output", "input gradient"), strict=True):
            usual = 2 * torchs + torch.finfo(torch.float32).eps
            if not error <= (usual if row.allowed_error is None else row.allowed_error):
                raise ValueError(f"wrong: its {what} is off by {error:.1e}, and torch's by {torchs:.1e}")
        return max(errors)


@dataclass(frozen=True)
class Contender:
    """A row that is timed."""

    row: Row
    inputs: Inputs
    step: Step
    error: float | None


@dataclass(frozen=True)
class Absent:
    """Why a row is not timed. failed: it should have run here."""

    reason: str
    failed: bool


def contenders(task: Task, settings: Settings) -> Iterator[tuple[str, Contender | Absent]]:
    """Every row by name, ready to be timed or not."""
    reference = Reference(task)
    inputs = draw_inputs(task, GPU_INPUT_SETS if task.device.type == "cuda" else 1)
    stopped = False
    for name, make_row in rows_of(task).items():
        if not settings.wants(name):
            continue
        if stopped:
            yield name, Absent(INTERRUPTED, failed=True)
            continue
        started_s = time.monotonic()
        try:
            error = reference.check(name) if is_ours(name) else None
            row = make_row()
            own = inputs.of(row, task.key_mask)
            step = make_step(row, own)
            run_once(step)  # what fails at its first use fails here
            yield name, Contender(row, own, step, error)
        except UnavailableError as reason:
            yield name, Absent(str(reason), failed=False)
        except KeyboardInterrupt:
            stopped = True
            yield name, Absent(INTERRUPTED, failed=True)
        except Exception as failure:  # of whatever kind: the other rows go on
            yield name, absent_after(failure)
        print(f"{name}: made in {time.monotonic() - started_s:.1f} s", file=sys.stderr)


def absent_after(failure: Exception) -> Absent:
    """What is left of a row that failed; the traceback goes to stderr."""
    traceback.print_exception(failure)
    if isinstance(failure, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
    return Absent(" ".join(f"{type(failure).__name__}: {failure}".split())[:200], failed=True)


def measure(name: str, settings: Settings, ceilings: Ceilings) -> list[dict[str, Any]]:
    """One record per row of the shape."""
    shape = SHAPES[name]
    task = make_task(shape, settings.dtype, settings.device, settings.dropout)
    heads = shape.num_attention_heads
    attention = AttentionShape(
        shape.batch, shape.length, heads, shape.hidden_size // heads, shape.causal, settings.dropout
    )
    backends = by_speed(attention, settings.device, settings.dtype, task.additive_mask())
    with preferring(list(backends)):
        found = dict(contenders(task, settings))
        times = timed(found, settings.rounds)
    records: list[dict[str, Any]] = []
    for row, result in found.items():
        record: dict[str, Any] = {"shape": name, "row": row, "torchs_attention_s": backends}
        if isinstance(result, Absent):
            record |= {"not_run": result.reason, "failed": result.failed}
        else:
            record |= _figures(result, times[row], work_of(shape, settings.dtype, result.row.packed), ceilings)
        records.append(record)
    _add_ratios(records)
    return records


def timed(found: dict[str, Contender | Absent], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of forward and backward of every step of every row, in turns; a row that fails becomes absent."""
    times: dict[str, list[tuple[float, float]]] = {row: [] for row in found}
    for turn in range(WARMUP_ROUNDS + rounds):
        for row, one in found.items():
            if isinstance(one, Absent):
                continue
            try:
                pairs = time_steps(one.step, one.inputs)
            except Exception as failure:  # as one that runs out of memory beside the others
                found[row] = absent_after(failure)
                continue
            if turn >= WARMUP_ROUNDS:
                times[row] += pairs
    return times


def _figures(one: Contender, times: list[tuple[float, float]], work: Work, ceilings: Ceilings) -> dict[str, Any]:
    forward_s, backward_s = (statistics.median(pair[i] for pair in times) for i in (0, 1))
    both_s = statistics.median(sum(pair) for pair in times)
    on_gpu, counted = one.inputs.dy[0].is_cuda, one.row.counts_memory
    return {
        "forward_s": forward_s,
        "backward_s": backward_s,
        "both_s": both_s,
        "peak_bytes": peak_bytes(one.step) if on_gpu and counted else None,
        "saved_bytes": saved_bytes(one.row, one.inputs.x[0]) if counted else None,
        "flop_per_s": work.flop / both_s,
        "share_of_roofline": work.floor_s(ceilings) / both_s,
        "error": one.error,
    }


def _add_ratios(records: list[dict[str, Any]]) -> None:
    both_s = {record["row"]: record["both_s"] for record in records if "both_s" in record}
    plain_s, compiled_s, ours_s = (both_s.get(name) for name in (PLAIN, BASELINE, OURS))
    for record in records:
        if "both_s" in record:
            record["speed_over_torch"] = plain_s / record["both_s"] if plain_s else None
            record["speed_over_compile"] = compiled_s / record["both_s"] if compiled_s else None
            record["speedup_of_ours"] = record["both_s"] / ours_s if ours_s else None


COLUMNS = {  # title: key, factor, format
    "fwd ms": ("forward_s", 1e3, ".2f"),
    "bwd ms": ("backward_s", 1e3, ".2f"),
    "both ms": ("both_s", 1e3, ".2f"),
    "peak MiB": ("peak_bytes", 2**-20, ".1f"),
    "saved MiB": ("saved_bytes", 2**-20, ".1f"),
    "TFLOP/s": ("flop_per_s", 1e-12, ".3g"),
    "roofline": ("share_of_roofline", 1, ".0%"),
    "vs torch": ("speed_over_torch", 1, ".2f"),
    "vs compile": ("speed_over_compile", 1, ".2f"),
    "ours is": ("speedup_of_ours", 1, ".2f"),
    "error": ("error", 1, ".0e"),
}


def table(records: list[dict[str, Any]]) -> str:
    """The figures for a person, and under them what was not run."""
    width = max(len(record["row"]) for record in records)
    lines = [f"{'shape':23} {'row':{width}}" + "".join(f"{title:>11}" for title in COLUMNS)]
    absent: dict[str, list[str]] = {}
    for record in records:
        if "not_run" in record:
            absent.setdefault(f"{record['row']}: {record['not_run']}", []).append(record["shape"])
            continue
        cells = (
            "-" if record[key] is None else f"{record[key] * factor:{format_}}"
            for key, factor, format_ in COLUMNS.values()
        )
        lines.append(f"{record['shape']:23} {record['row']:{width}}" + "".join(f"{cell:>11}" for cell in cells))
    lines += [f"not run: {what} ({', '.join(shapes)})" for what, shapes in absent.items()]
    for shape, backends in {record["shape"]: record["torchs_attention_s"] for record in records}.items():
        speeds = ", ".join(f"{name} {1e3 * seconds:.3f} ms" for name, seconds in backends.items())
        lines.append(f"torch's attention at {shape}: {speeds or 'its own choice'}")
    return "\n".join(lines)


def main() -> None:
    device = default_device()
    on_gpu = device.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=GPU_SHAPES if on_gpu else CPU_SHAPES)
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16" if on_gpu else "float32"
    )
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", nargs="+", help="only these, as the table calls them")
    parser.add_argument("--out", type=Path, help="JSON lines go here; the file is written anew")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    settings = Settings(device, dtype, arguments.dropout, arguments.rounds, arguments.rows)
    machine, ceilings = machine_line(), measure_ceilings(device, settings.dtype)
    head = {"machine": machine, "dtype": arguments.dtype, "dropout": settings.dropout, "rounds": settings.rounds}
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(head | asdict(ceilings)) + "\n")
    print(f"{machine}; {arguments.dtype}, dropout {settings.dropout}, medians of {settings.rounds} rounds")
    print(f"roofline: {ceilings}", flush=True)
    records: list[dict[str, Any]] = []
    for name in arguments.shapes:
        started_s = time.monotonic()
        measured = measure(name, settings, ceilings)
        records += measured
        if arguments.out is not None:
            with arguments.out.open("a") as file:
                file.writelines(json.dumps(record) + "\n" for record in measured)
        print(f"\n{table(measured)}", flush=True)
        print(f"{name}: {time.monotonic() - started_s:.0f} s", file=sys.stderr)
        if any(record.get("not_run") == INTERRUPTED for record in measured):
            sys.exit("interrupted")
        _forget_shape()
    unknown = set(arguments.rows or ()) - {record["row"].removesuffix(EMULATED) for record in records}
    if unknown:
        sys.exit(f"no shape has a row called {', '.join(sorted(unknown))}")
    if any(record.get("failed") and is_ours(record["row"]) for record in records):
        sys.exit("one of our rows failed or is wrong")


def _forget_shape() -> None:
    """Frees the memory of a shape's rows and what was compiled for it."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
