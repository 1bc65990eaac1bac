"""What a step of a small model costs on a CPU, against a plain torch model of the same shape, in turns.

  python scripts/bench/bench_small_step.py --threads 1

Each row is a process of its own, as a run keeps freed memory, and a plain model would find that in its process.

nanogpt is nanoGPT's published run for a CPU: 4 layers of width 128, 4 heads, 12 rows of 64 characters, no biases, GELU by erf.
bert_tiny is configs/bert_tiny.yaml; bert_base is configs/bert_base.yaml with 8 sequences of 128 and dropout, and its plain
model is BertForPreTraining of `transformers`. Ours takes a step as a run does, our model in the engine through `train_step`,
with the libraries that a run would choose for its products.
The plain model (plain_models.py) takes fp32 steps, or in bf16 under torch.autocast; both have fused AdamW, clipping at 1.0 and
the same batches of random tokens. Ours has the vocabulary of a run, rounded up to a multiple of 64, the plain model that of the
text.

Prints, of each shape and number of threads, the median milliseconds of a step and the ratios to the plain model's.
"""

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from bench_device import machine_line
from bench_train import VOCAB_SIZE, engine_of, our_model, random_step, step_of, stock_inputs, stock_model
from plain_models import PlainBert, PlainGpt
from torch import nn

from xformer_train.kernels.ops.linear import using_cpu_libraries
from xformer_train.launcher.config.loading import load_config
from xformer_train.launcher.config.schema import RunConfig
from xformer_train.launcher.optim.engine import set_learning_rate
from xformer_train.launcher.processes.products import choose, products_shape, this_cpu
from xformer_train.launcher.processes.topology import Topology, quiet, start_processes, stop_processes
from xformer_train.launcher.training.steps import StepData, train_step
from xformer_train.recipes import RECIPES
from xformer_train.recipes.gpt.samples import with_document_borders

_NANOGPT = [
    "model.num_hidden_layers=4",
    "model.num_attention_heads=4",
    "model.max_position_embeddings=64",
    "model.hidden_act=gelu",
    *(f"model.{name}=false" for name in ("attention_bias", "mlp_bias", "norm_bias")),
    "data.max_seq_length=64",
    "training.train_batch_size=12",
    "training.micro_batch_size=12",
]
_BERT_BASE = ["model.pre_layer_norm=false", "training.train_batch_size=8", "training.micro_batch_size=8"]
_BERT_BASE += ["training.gradient_accumulation_steps=null"]


class Transformers(nn.Module):
    """BertForPreTraining as it comes, with the labels of every position."""

    def __init__(self, config: RunConfig, _: int) -> None:
        super().__init__()
        self.model = stock_model(config)

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        """Return the sum of both mean losses; the tensors as our own BERT takes them."""
        mask = batch["attention_mask"].long()
        loss: torch.Tensor = self.model(**stock_inputs(batch), attention_mask=mask).loss
        return loss


# name: config, its changes, symbols of the tokenizer, the plain model of a config and that number
SHAPES: dict[str, tuple[str, list[str], int, Callable[[RunConfig, int], nn.Module]]] = {
    "nanogpt": ("configs/gpt_tiny.yaml", _NANOGPT, 257, PlainGpt),
    "bert_base": ("configs/bert_base.yaml", _BERT_BASE, VOCAB_SIZE, Transformers),
    "bert_tiny": ("configs/bert_tiny.yaml", ["training.micro_batch_size=64"], 2048, PlainBert),
}
ROWS = ["ours fp32", "plain fp32", "ours bf16", "plain bf16"]
_BATCHES, _WARM_UPS = 8, 3
Take = Callable[[int], object]
Row = tuple[str, str, list[str], int]
"""Shape, name, changes of the config, threads."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["nanogpt", "bert_tiny"])
    parser.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further changes of the config")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=8, help="of a row in a round")
    arguments = parser.parse_args()
    for shape in arguments.shapes:
        for threads in arguments.threads:
            torch.set_num_threads(threads)  # which the table says
            rows = [(shape, name, arguments.set, threads) for name in arguments.rows]
            times = measured(rows, arguments.rounds, arguments.steps)
            print(table(shape, dict(zip(arguments.rows, times, strict=True))), flush=True)


def take_turns(turns: Connection, shape: str, name: str, sets: list[str], threads: int) -> None:
    """Take a row's steps when told to: from which batch on, and how many; answer with the milliseconds of one."""
    quiet(debug=False)
    torch.set_num_threads(threads)
    path, own, symbols, plain = SHAPES[shape]
    config = load_config(path, [*own, *sets]).config
    data = random_batches(config, symbols)
    torch.manual_seed(config.seed)
    whose, precision = name.split()
    with ExitStack() as held:
        if whose == "ours":
            topology = start_processes(600.0)
            held.callback(stop_processes)
            size = config.training.micro_batch_size
            assert size is not None, "every shape gives it"
            products = choose(precision, topology.device, [this_cpu()], products_shape(config, size))
            if products.libraries is not None:
                held.enter_context(using_cpu_libraries(products.libraries))
            take = ours(config, topology, precision, data, -(-symbols // 64) * 64)
        else:
            take = theirs(config, plain(config, symbols), precision, data)
        while (turn := turns.recv()) is not None:
            first, steps = turn
            started_s = time.perf_counter()
            for index in range(first, first + steps):
                take(index)
            turns.send((time.perf_counter() - started_s) / steps * 1e3)


def random_batches(config: RunConfig, symbols: int) -> list[StepData]:
    """Return steps of one micro-batch of random tokens, as the loader hands them to a run whose text has `symbols` symbols."""
    if config.model.type == "bert":
        return [random_step(config, seed, symbols) for seed in range(_BATCHES)]
    size, recipe, eos_id = (
        (config.training.train_batch_size, config.data.max_seq_length + 1),
        RECIPES["gpt"],
        symbols - 1,
    )
    draw = np.random.default_rng(0)
    steps = []
    for _ in range(_BATCHES):
        arrays = with_document_borders(draw.integers(eos_id, size=size), eos_id)
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        steps.append(StepData([batch], recipe.loss_counts(batch, config.objective), recipe.real_tokens(batch)))
    return steps


def ours(config: RunConfig, topology: Topology, precision: Any, data: list[StepData], vocab_size: int) -> Take:
    """Return what takes a step of a run."""
    engine = engine_of(config, topology, precision, lambda config: our_model(config, vocab_size))

    def take(index: int) -> None:
        set_learning_rate(engine, config.optimizer.lr)
        train_step(engine, data[index % len(data)], topology)

    return take


def theirs(config: RunConfig, model: nn.Module, precision: str, data: list[StepData]) -> Take:
    """Return what takes a step of the plain model, in bf16 under autocast."""

    def loss_of(batch: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss: torch.Tensor = model(**batch)
        return loss

    take = step_of(model, config, loss_of)
    return lambda index: take(dict(data[index % len(data)].micro_batches[0]))


def measured(rows: list[Row], rounds: int, steps: int) -> list[list[float]]:
    """Return the milliseconds of a step of each row in each round."""
    times: list[list[float]] = [[] for _ in rows]
    with ExitStack() as held:
        turns = [held.enter_context(waiting(row)) for row in rows]
        for number in range(-1, rounds):  # the first is for warming up
            for row, turn in zip(times, turns, strict=True):
                turn.send((max(0, number) * steps, min(_WARM_UPS, steps) if number < 0 else steps))
                row.append(turn.recv())
    return [row[1:] for row in times]


@contextmanager
def waiting(row: Row) -> Iterator[Connection]:
    """Yield what tells the process of a row to take its turn; the process ends with the context."""
    os.environ["OMP_NUM_THREADS"] = str(row[-1])
    spawning = multiprocessing.get_context("spawn")
    here, there = spawning.Pipe()
    process = spawning.Process(target=take_turns, args=(there, *row), daemon=True)
    process.start()
    there.close()  # so that its end is noticed
    try:
        yield here
        here.send(None)
        process.join()
    finally:
        process.kill()


def table(shape: str, times: dict[str, list[float]]) -> str:
    """Return the figures for a person; a ratio is the median of those of the rounds."""
    lines = [f"{shape}, {machine_line()}", f"{'':12}{'ms/step':>9}{'/ plain fp32':>14}{'/ plain bf16':>14}"]
    for name, row in times.items():
        line = f"{name:12}{statistics.median(row):9.2f}"
        for plain in ("plain fp32", "plain bf16"):
            ratios = [mine / other for mine, other in zip(row, times.get(plain, []), strict=False)]
            line += f"{statistics.median(ratios):14.2f}" if ratios else " " * 14
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    main()
