"""Attention alone, forward and backward: ours against torch's backends, and our kernels at other tiles than they have.

A shape is `batch x tokens` of `heads x columns`. Backward of ours gives the gradient of the packed qkv, that of torch those of
q, k and v apart. Every line is printed, and written to --out as JSON, as soon as it is measured; a tile that does not fit the
GPU, or whose result differs from that of the kernels as they are, is a line that says so. Last come the best tiles, in the form
of the kernels' own table.

On a CPU it needs TRITON_INTERPRET=1, and takes shapes so small that it shows only that it runs.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_device import default_device, machine_line, seconds_of
from sdpa import AttentionShape, times
from torch import Tensor
from torch.nn.attention import SDPBackend

from xformer_train.kernels.ops.attention import attention_backward_triton, attention_triton

Tile = tuple[int, int, int, int]
"""Queries, keys, warps and pipeline stages of a program."""
GPU_SHAPES = {
    "64x128 of 16x64": AttentionShape(64, 128, 16, 64),
    "16x512 of 16x64": AttentionShape(16, 512, 16, 64),
    "4x2048 of 32x128, causal": AttentionShape(4, 2048, 32, 128, causal=True),
}
CPU_SHAPES = {
    "1x40 of 1x16": AttentionShape(1, 40, 1, 16),
    "1x140 of 1x16, causal": AttentionShape(1, 140, 1, 16, causal=True),
}
P = 0.1
LARGEST_DIFFERENCE = 0.01  # relative, of bf16 in another order of additions
BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
CHOOSERS: dict[str, tuple[Any, str]] = {
    "forward": (attention_triton, "_tile"),
    "queries": (attention_backward_triton, "_query_tile"),
    "keys": (attention_backward_triton, "_key_tile"),
}
"""The function of each kernel that chooses its tile."""
# Kernel and columns of a head -> tiles that may be better than the kernel's own, the most promising first.
CANDIDATES: dict[tuple[str, int], list[Tile]] = {
    ("forward", 64): [(128, 128, 8, 2), (64, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 2)],
    ("queries", 64): [(128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 3), (128, 32, 8, 2)],
    ("keys", 64): [(64, 64, 4, 2), (32, 128, 8, 2), (64, 128, 8, 2), (32, 64, 4, 3)],
    ("forward", 128): [(128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (128, 128, 8, 2)],
    ("queries", 128): [(128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 64, 8, 2)],
    ("keys", 128): [(32, 128, 8, 2), (64, 128, 8, 2), (32, 64, 4, 2), (64, 64, 8, 2)],
}


class Ours:
    """Our kernels on the sets of inputs of a shape, in turns."""

    def __init__(self, shape: AttentionShape, sets: Sequence[tuple[Tensor, Tensor]], calls: int) -> None:
        self._sets, self._calls, self._device = sets, calls, sets[0][0].device
        seed = torch.tensor(7, device=self._device)
        self._arguments = {"causal": shape.causal, "p": shape.p, "seed": seed, "site": 1}
        self._results = [attention_triton.forward(qkv, **self._arguments) for qkv, _ in sets]
        self._turns = itertools.cycle(range(len(sets)))

    def forward(self, index: int) -> Tensor:
        """Return the output."""
        return attention_triton.forward(self._sets[index][0], **self._arguments)[0]

    def backward(self, index: int) -> Tensor:
        """Return the gradient of qkv."""
        qkv, dout = self._sets[index]
        return attention_backward_triton.backward(dout, qkv, *self._results[index], **self._arguments)

    def seconds(self, function: Callable[[int], Tensor]) -> float:
        """Return the seconds of one call."""
        return seconds_of(lambda: function(next(self._turns)), self._device, self._calls)


def lines(name: str, shape: AttentionShape, device: torch.device) -> Iterator[dict[str, Any]]:
    """Measures a shape without and with dropout, and with it each kernel at its candidate tiles."""
    on_gpu = device.type == "cuda"
    dtype, calls = (torch.bfloat16, 8) if on_gpu else (torch.float16, 1)  # the interpreter multiplies bf16 wrongly
    sets = shape.draw(device, dtype)
    for p in (0.0, P):
        case = replace(shape, p=p)
        for row, measure in rows(case, sets, calls).items():
            record: dict[str, Any] = {"shape": name, "p": p, "row": row}
            with failing_alone(record):
                record["forward_s"], record["backward_s"] = measure()
            yield record
    ours = Ours(case, sets, calls)
    for kernel, tiles in candidates(shape, on_gpu).items():
        function = ours.forward if kernel == "forward" else ours.backward
        wanted = function(0)
        for tile in [None, *tiles]:
            record = {"shape": name, "p": P, "kernel": kernel, "tile": tile}
            with failing_alone(record), tiled(kernel, tile):
                found = function(0)
                record["off"] = ((found - wanted).norm() / wanted.norm()).item()
                record["s"] = ours.seconds(function)
            yield record


def rows(
    shape: AttentionShape, sets: Sequence[tuple[Tensor, Tensor]], calls: int
) -> dict[str, Callable[[], tuple[float, float]]]:
    """How to measure forward and backward of ours and of torch's backends."""

    def ours() -> tuple[float, float]:
        kernels = Ours(shape, sets, calls)
        return kernels.seconds(kernels.forward), kernels.seconds(kernels.backward)

    return {"ours": ours} | {backend.name: functools.partial(times, backend, shape, sets) for backend in BACKENDS}


def candidates(shape: AttentionShape, on_gpu: bool) -> dict[str, list[Tile]]:
    """The tiles to try for each kernel that works on a shape, in the interpreter one of each."""
    kernels = ["forward"]
    if shape.length > 128 or shape.width > 64:  # else one kernel does all of backward
        kernels += ["queries", "keys"]
    width = 64 if shape.width <= 64 else 128
    return {kernel: CANDIDATES[kernel, width][: None if on_gpu else 1] for kernel in kernels}


@contextlib.contextmanager
def tiled(kernel: str, tile: Tile | None) -> Iterator[None]:
    """Lets a kernel have this tile in the block; None: its own."""
    module, chooser = CHOOSERS[kernel]
    own = getattr(module, chooser)
    if tile is not None:
        setattr(module, chooser, lambda *_: tile)
    try:
        yield
    finally:
        setattr(module, chooser, own)


@contextlib.contextmanager
def failing_alone(record: dict[str, Any]) -> Iterator[None]:
    """Notes a failure of the block in the record, of whatever kind it is: the other lines go on."""
    try:
        yield
    except Exception as failure:
        traceback.print_exception(failure)
        record["failed"] = " ".join(f"{type(failure).__name__}: {failure}".split())[:120]


def words(record: dict[str, Any]) -> str:
    """The record for a person."""
    what = record["row"] if "row" in record else f"{record['kernel']} {record['tile'] or 'as it is'}"
    head = f"{record['shape']:26} p={record['p']:<4} {what:28}"
    if "failed" in record:
        return f"{head} failed: {record['failed']}"
    if "row" in record:
        return f"{head} forward {1e3 * record['forward_s']:8.4f} ms, backward {1e3 * record['backward_s']:8.4f} ms"
    return f"{head} {1e3 * record['s']:8.4f} ms{', WRONG' * is_wrong(record)}"


def is_wrong(record: dict[str, Any]) -> bool:
    """Whether a tile gives another result than the kernel as it is, beyond the rounding of bf16."""
    return not record["off"] <= LARGEST_DIFFERENCE


def best_tiles(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The best tile of each kernel on each shape, and what it gains."""
    tried = [record for record in records if "s" in record and not is_wrong(record)]
    for (shape, kernel), group in itertools.groupby(tried, key=lambda record: (record["shape"], record["kernel"])):
        own, *others = sorted(group, key=lambda record: record["tile"] is not None)
        best = min([own, *others], key=lambda record: record["s"])
        yield f"{shape:26} {kernel:8} {best['tile'] or 'as it is'}: {own['s'] / best['s']:.2f} times as fast as it is"


def main() -> None:
    device = default_device()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON lines go here; the file is written anew")
    arguments = parser.parse_args()
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("without a GPU bench_attention.py needs TRITON_INTERPRET=1")
    print(machine_line(), flush=True)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"machine": machine_line()}) + "\n")
    records: list[dict[str, Any]] = []
    shapes = GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
    interrupted = False
    try:
        for record in itertools.chain.from_iterable(lines(name, shape, device) for name, shape in shapes.items()):
            records.append(record)
            print(words(record), flush=True)
            if arguments.out is not None:
                with arguments.out.open("a") as file:
                    file.write(json.dumps(record) + "\n")
    except KeyboardInterrupt:  # as by a limit of time: the best of what was tried is known
        interrupted = True
    print("\n".join(["best tiles:", *best_tiles(records)]))
    if interrupted or any("failed" in record for record in records if record.get("row") == "ours"):
        sys.exit("interrupted" if interrupted else "our kernels failed")


if __name__ == "__main__":
    main()
