"""What share of a step each optimizer takes on a CPU.

  OMP_NUM_THREADS=1 python scripts/bench/bench_optimizer.py --shapes nanogpt --precision fp32

nanogpt is that of bench_small_step.py; bert_base is configs/bert_base.yaml, 256 sequences of 128 tokens a step. Timed are one
micro-batch, forward and backward of our model on random tokens, and one step of each optimizer on fp32 weights with random
gradients. The share is the optimizer's time over the sum of it and of all micro-batches of a step, one after another; clipping,
data and the engine's own work are in neither. Muon multiplies in bf16 where the row is in bf16, or as --newton_schulz says.

Prints, of each shape and precision, the median milliseconds of a micro-batch, and of each optimizer those of its step and its
share.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from bench_device import machine_line
from bench_small_step import SHAPES, random_batches
from bench_train import our_model
from torch import nn

from xformer_train.launcher.config.loading import load_config
from xformer_train.launcher.config.optimizers import OptimizerConfig
from xformer_train.launcher.config.schema import RunConfig
from xformer_train.launcher.optim.optimizer import OPTIMIZERS, build_optimizer
from xformer_train.launcher.processes.topology import keep_freed_memory

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_BERT_BASE = ("configs/bert_base.yaml", ["training.micro_batch_size=4"], 30522)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=["nanogpt", "bert_base"], default=["nanogpt", "bert_base"])
    parser.add_argument("--precision", nargs="+", choices=list(_DTYPES), default=list(_DTYPES))
    parser.add_argument("--newton_schulz", choices=list(_DTYPES), help="what Muon multiplies in; default the precision")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further changes of the config")
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement, after one that does not count")
    arguments = parser.parse_args()
    keep_freed_memory()  # as a run does
    for shape in arguments.shapes:
        path, own, symbols = _BERT_BASE if shape == "bert_base" else SHAPES[shape][:3]
        config = load_config(path, [*own, *arguments.set]).config
        rows = -(-symbols // 64) * 64
        steps = optimizer_ms(config, rows, arguments.newton_schulz, arguments.precision, arguments.repeats)
        for precision in arguments.precision:
            micro_batch = micro_batch_ms(config, symbols, rows, precision, arguments.repeats)
            print(table(f"{shape} in {precision}", config, micro_batch, steps[precision]), flush=True)


def micro_batch_ms(config: RunConfig, symbols: int, rows: int, precision: str, repeats: int) -> float:
    """Return the milliseconds of forward and backward of one micro-batch."""
    model = our_model(config, rows).to(_DTYPES[precision]).train()
    (batch,) = random_batches(config, symbols)[0].micro_batches

    def take() -> None:
        sums: dict[str, Any] = model(**batch)
        sum((part.float() for part in sums.values()), torch.zeros(())).backward()

    return median_ms(take, repeats)


def optimizer_ms(
    config: RunConfig, rows: int, newton_schulz: str | None, precisions: list[str], repeats: int
) -> dict[str, dict[str, float]]:
    """Return the milliseconds of a step of each optimizer by its type, of each precision."""
    model = our_model(config, rows)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    found: dict[str, dict[str, float]] = {precision: {} for precision in precisions}
    for kind in OPTIMIZERS:
        for precision in precisions:
            known = found[precisions[0]].get(kind)
            if known is not None and (kind != "muon" or newton_schulz):
                found[precision][kind] = known  # weights and moments are in fp32 in both
                continue
            found[precision][kind] = median_ms(_stepping(model, kind, newton_schulz or precision), repeats)
    return found


def _stepping(model: nn.Module, kind: str, newton_schulz: str) -> Callable[[], object]:
    keys = {"newton_schulz_dtype": newton_schulz} if kind == "muon" else {}
    return build_optimizer(model, OptimizerConfig.model_validate({"type": kind, "lr": 1e-5, **keys})).step


def median_ms(take: Callable[[], object], repeats: int) -> float:
    """Return the median milliseconds of a call, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        started_s = time.perf_counter()
        take()
        times.append((time.perf_counter() - started_s) * 1e3)
    return statistics.median(times[1:])


def table(title: str, config: RunConfig, micro_batch: float, steps: dict[str, float]) -> str:
    """Return the figures for a person."""
    whole, micro = config.training.train_batch_size, config.training.micro_batch_size
    assert whole is not None and micro is not None, "the shapes give both"
    count = whole // micro
    lines = [f"{title}, {machine_line()}: {count} x {micro_batch:.1f} ms of {micro} sequences"]
    for kind, step in steps.items():
        lines.append(f"  {kind:8}{step:10.2f} ms{step / (step + count * micro_batch):8.1%}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
