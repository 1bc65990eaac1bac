"""Attention alone, forward and backward: ours against torch's backends, and our kernels at other tiles than they have.

A shape is `batch x tokens` of `heads x columns`. Backward of ours gives the gradient of the packed qkv, that of torch those of
q, k and v apart. Every line is printed, and written to --out as JSON, as soon as it is measured; a tile that does not fit the
GPU, or whose result differs from that of the kernels as they are, is a line that says so. Last come the best tiles, as
kernels/ops/attention/attention_tiles.py, which holds the table of the kernels, writes them.

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
from xformer_train.kernels.ops.attention.attention_tiles import Tile, Tiles
from xformer_train.kernels.ops.attention.attention_triton import Options, choose_tiles

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
# Kernel and columns of a head -> tiles that may be better than the kernel's own, the most promising first. `whole` is the
# kernel that does all of backward for short sequences; elsewhere `queries` makes dQ, and `keys` dK and dV.
CANDIDATES: dict[tuple[str, int], list[Tile]] = {
    ("forward", 64): [Tile(128, 128, 8, 2), Tile(128, 64, 8, 3), Tile(64, 64, 4, 3), Tile(128, 64, 4, 3)],
    ("whole", 64): [Tile(64, 128, 8, 1), Tile(32, 128, 8, 1), Tile(64, 128, 8, 2), Tile(32, 128, 4, 2)],
    ("queries", 64): [Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 4, 3)],
    ("keys", 64): [Tile(64, 64, 4, 2), Tile(32, 128, 8, 2), Tile(64, 128, 8, 2), Tile(32, 64, 4, 3)],
    ("forward", 128): [Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), Tile(64, 64, 4, 2), Tile(128, 128, 8, 2)],
    ("queries", 128): [Tile(128, 32, 8, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 64, 8, 2)],
    ("keys", 128): [Tile(64, 128, 8, 2), Tile(32, 64, 8, 2), Tile(32, 64, 4, 2), Tile(64, 64, 8, 2)],
}


class Ours:
    """Our kernels on the sets of inputs of a shape, in turns. tiles: None for their own."""

    def __init__(
        self, shape: AttentionShape, sets: Sequence[tuple[Tensor, Tensor]], calls: int, tiles: Tiles | None = None
    ) -> None:
        self._sets, self._calls, self._device = sets, calls, sets[0][0].device
        seed = torch.tensor(7, device=self._device)
        self._options, self._tiles = Options(causal=shape.causal, p=shape.p, seed=seed, site=1), tiles
        self._results = [attention_triton.forward(qkv, self._options, tiles) for qkv, _ in sets]
        self._turns = itertools.cycle(range(len(sets)))

    def forward(self, index: int) -> Tensor:
        """Return the output."""
        return attention_triton.forward(self._sets[index][0], self._options, self._tiles)[0]

    def backward(self, index: int) -> Tensor:
        """Return the gradient of qkv."""
        qkv, dout = self._sets[index]
        result = self._results[index]
        return attention_backward_triton.backward(dout, qkv, *result, self._options, tiles=self._tiles)

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
    own = choose_tiles(sets[0][0], shape.length, Options(seed=torch.tensor(7), p=P))
    for kernel in (name for name, tile in own._asdict().items() if tile is not None):
        tried = CANDIDATES[
            "whole" if kernel == "keys" and own.queries is None else kernel, 64 if shape.width <= 64 else 128
        ]
        wanted = one_result(Ours(case, sets, calls, own), kernel)
        for tile in dict.fromkeys([getattr(own, kernel), *tried[: None if on_gpu else 1]]):
            record = {"shape": name, "p": P, "kernel": kernel, "tile": tile, "own": tile == getattr(own, kernel)}
            with failing_alone(record):
                ours = Ours(case, sets, calls, own._replace(**{kernel: tile}))
                found = one_result(ours, kernel)
                record["off"] = ((found - wanted).norm() / wanted.norm()).item()
                record["s"] = ours.seconds(ours.forward if kernel == "forward" else ours.backward)
            yield record


def one_result(ours: Ours, kernel: str) -> Tensor:
    """Return the output, or for a kernel of backward the gradient."""
    return (ours.forward if kernel == "forward" else ours.backward)(0)


def rows(
    shape: AttentionShape, sets: Sequence[tuple[Tensor, Tensor]], calls: int
) -> dict[str, Callable[[], tuple[float, float]]]:
    """How to measure forward and backward of ours and of torch's backends."""

    def ours() -> tuple[float, float]:
        kernels = Ours(shape, sets, calls)
        return kernels.seconds(kernels.forward), kernels.seconds(kernels.backward)

    return {"ours": ours} | {backend.name: functools.partial(times, backend, shape, sets) for backend in BACKENDS}


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
    what = (
        record["row"] if "row" in record else f"{record['kernel']} {tuple(record['tile'])}{', its own' * record['own']}"
    )
    head = f"{record['shape']:26} p={record['p']:<4} {what:42}"
    if "failed" in record:
        return f"{head} failed: {record['failed']}"
    if "row" in record:
        return f"{head} forward {1e3 * record['forward_s']:8.4f} ms, backward {1e3 * record['backward_s']:8.4f} ms"
    return f"{head} {1e3 * record['s']:8.4f} ms{', WRONG' * is_wrong(record)}"


def is_wrong(record: dict[str, Any]) -> bool:
    """Whether a tile gives another result than the kernel as it is, beyond the rounding of bf16."""
    return not record["off"] <= LARGEST_DIFFERENCE


def best_tiles(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The best tile of each kernel on each shape, as attention_tiles.py writes it, and what it gains."""
    tried = [record for record in records if "s" in record and not is_wrong(record)]
    for (shape, kernel), group in itertools.groupby(tried, key=lambda record: (record["shape"], record["kernel"])):
        times = {record["tile"]: record["s"] for record in group}
        own, best = next(iter(times)), min(times, key=lambda tile: times[tile])
        numbers = ", ".join(str(number) for number in best if number is not None)
        gain = "its own" if best == own else f"{times[own] / times[best]:.2f} times as fast as its own"
        yield f"{shape:26} {kernel:8} Tile({numbers}), {gain}"


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
