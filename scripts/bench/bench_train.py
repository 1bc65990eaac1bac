"""What whole training steps cost, against `transformers`; one form for a CPU and one for a GPU.

On a CPU, three ways to train the same BERT on the same batches, in turns within one process:
  loop          xformer-train itself, from config to last step (time in steps, as metrics.jsonl has it)
  bare          forward, backward, clipping and optimizer step of the same model, nothing around it
  transformers  BertForPreTraining as it comes, with the labels of every position, and the same optimizer

On a GPU, and with --engines on a CPU too, models in engines alike (the precision, optimizer and clipping of the run config), in
turns within one process, at each config's micro-batch without accumulation, on random tokens of full length:
  xformer-train  the model and step of a run
  CUDA graph     the same with layer.cuda_graph
  transformers   BertForPreTraining as it comes, without a mask, with the labels of every position

Prints a table of each config as soon as it is measured, and writes JSON. Figures are medians over the steps of all turns but
each turn's first two; of engines, over the turns. An engine that fails or runs out of memory loses its row alone.
"""

import argparse
import contextlib
import functools
import json
import math
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_device import machine_line, synchronize
from torch import Tensor, nn

from xformer_train.kernels.ops.linear import cpu_libraries, using_cpu_libraries
from xformer_train.launcher.config.batch import solve_batch
from xformer_train.launcher.config.deepspeed import deepspeed_config
from xformer_train.launcher.config.loading import LoadedConfig, load_config
from xformer_train.launcher.config.schema import Precision, RunConfig
from xformer_train.launcher.optim.engine import build_engine
from xformer_train.launcher.optim.optimizer import build_optimizer
from xformer_train.launcher.processes.products import choose, products_shape, this_cpu
from xformer_train.launcher.processes.topology import Topology, device_name, quiet, start_processes, stop_processes
from xformer_train.launcher.reporting.peak_flops import peak_flops
from xformer_train.launcher.training.steps import StepData, train_step
from xformer_train.recipes import RECIPES
from xformer_train.recipes.data.stream import prepare_data
from xformer_train.recipes.data.tokenizer import load_tokenizer

CPU_CONFIGS = ["configs/bert_base.yaml"]
GPU_CONFIGS = ["configs/bert_large_seq128.yaml", "configs/bert_large_seq512.yaml"]
VOCAB_SIZE = 30528  # BERT's 30,522 and the rows that a run adds to them
WARMUP_STEPS = 2
ENGINES = ("xformer-train", "CUDA graph", "transformers")
Tensors = dict[str, Tensor]


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", default=GPU_CONFIGS if on_gpu else CPU_CONFIGS)
    parser.add_argument("--layers", type=int, help="fewer layers than the config has, to be done sooner")
    parser.add_argument(
        "--micro-batch-size", type=int, default=None if on_gpu else 8, help="default on a GPU: the config's"
    )
    parser.add_argument("--steps", type=int, default=22 if on_gpu else 6, help="of one turn, the first two not counted")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--engines", action="store_true", help="measure as on a GPU")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    arguments = parser.parse_args()
    quiet(debug=False)
    results = []
    engines = on_gpu or arguments.engines
    for config in arguments.config:
        results.append(measure_engines(arguments, config) if engines else measure_on_cpu(arguments, config))
        if arguments.out is not None:  # after each, so that a call cut short leaves what it measured
            arguments.out.write_text(json.dumps(results, indent=2) + "\n")
        print(table(results[-1]), flush=True)
    if engines and any(len(result["step_time_s"]) < len(ENGINES) for result in results):
        sys.exit("a row failed")


def measure_on_cpu(arguments: argparse.Namespace, path: str) -> dict[str, Any]:
    """Median step times in seconds, sequences per second and ratios."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = cpu_config(arguments, path, folder).config
        times: dict[str, list[float]] = {"loop": [], "bare": [], "transformers": []}
        # The first turn of the loop makes tokenizer and data, which the others then read.
        times["loop"] += loop_turn(cpu_config(arguments, path, folder, name="turn0"))
        batches = read_batches(config, folder / "turn0" / "tokenizer", arguments.steps)
        bare, stock = bare_step(config), stock_step(config)
        stock_batches = [stock_inputs(batch) | {"attention_mask": batch["attention_mask"].long()} for batch in batches]
        for turn in range(arguments.turns):
            times["bare"] += timed(bare, batches)
            times["transformers"] += timed(stock, stock_batches)
            if turn:
                times["loop"] += loop_turn(cpu_config(arguments, path, folder, name=f"turn{turn}"))
    medians = {row: statistics.median(values) for row, values in times.items()}
    return {
        "machine": machine_line(),
        "shape": shape_line(config, arguments.micro_batch_size),
        "step_time_s": medians,
        "sequences_per_s": {row: arguments.micro_batch_size / value for row, value in medians.items()},
        "notes": [
            f"loop over bare model: {medians['loop'] / medians['bare'] - 1:+.1%}",
            f"loop against transformers: {medians['transformers'] / medians['loop']:.2f}x",
        ],
    }


def shape_line(config: RunConfig, micro_batch_size: int) -> str:
    """What was trained."""
    model = config.model
    return (
        f"{model.num_hidden_layers} layers, hidden {model.hidden_size}, vocabulary {VOCAB_SIZE:,}, "
        f"{micro_batch_size} sequences of {config.data.max_seq_length}, {config.optimizer.type}"
    )


def cpu_config(arguments: argparse.Namespace, path: str, folder: Path, name: str = "bench") -> LoadedConfig:
    """The given run config on the built-in corpus, at the benchmark's batch, a few steps long."""
    sets = [
        "data.sources=[{kind: builtin}]",
        "data.validation_fraction=0.0",
        f"data.cache_dir={folder / 'cache'}",
        "tokenizer={vocab_size: 8192}",
        f"model.vocab_size={VOCAB_SIZE}",
        "model.pre_layer_norm=false",
        f"training.train_batch_size={arguments.micro_batch_size}",
        f"training.micro_batch_size={arguments.micro_batch_size}",
        "training.gradient_accumulation_steps=null",
        f"training.max_steps={arguments.steps}",
        "schedule={type: constant}",
        "eval.every_steps=null",
        "logging={every_steps: 1}",
        f"output_dir={folder}",
        f"name={name}",
    ]
    if arguments.layers is not None:
        sets.append(f"model.num_hidden_layers={arguments.layers}")
    return load_config(path, sets)


def loop_turn(loaded: LoadedConfig) -> list[float]:
    """Seconds of each counted step of one whole run."""
    from xformer_train.launcher.training.train import run  # imports DeepSpeed, which `quiet` must precede

    run(loaded, resume=False)
    path = Path(loaded.config.output_dir) / loaded.config.name / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    size = loaded.config.training.train_batch_size
    assert size is not None
    return [size / row["seq_per_s"] for row in rows if "seq_per_s" in row][WARMUP_STEPS:]


def read_batches(config: RunConfig, tokenizer: Path, steps: int) -> list[Tensors]:
    """The batches that the loop trains on."""
    symbols = load_tokenizer(tokenizer)
    data = prepare_data(RECIPES["bert"], symbols, config.data, config.objective, config.seed, lambda _: None)
    size = config.training.train_batch_size
    assert size is not None
    return [dict(data.train.batch(row)) for row in np.arange(steps * size).reshape(steps, size)]


def timed(take: Callable[[Tensors], None], batches: list[Tensors]) -> list[float]:
    """Seconds of each counted step."""
    seconds = []
    for batch in batches:
        started_s = time.perf_counter()
        take(batch)
        seconds.append(time.perf_counter() - started_s)
    return seconds[WARMUP_STEPS:]


def bare_step(config: RunConfig) -> Callable[[Tensors], None]:
    """A step of our model with nothing around it."""
    recipe, model = RECIPES["bert"], our_model(config)

    def loss_of(batch: Tensors) -> Tensor:
        sums, counts = model(**batch), recipe.loss_counts(batch, config.objective)
        return sum((sums[part] / counts[part] for part in sums), torch.zeros(()))

    return step_of(model, config, loss_of)


def stock_step(config: RunConfig) -> Callable[[Tensors], None]:
    """A step of the stock model."""
    model = stock_model(config)
    return step_of(model, config, lambda inputs: model(**inputs).loss)


def step_of(model: nn.Module, config: RunConfig, loss_of: Callable[[Tensors], Tensor]) -> Callable[[Tensors], None]:
    """Return a step with the optimizer and the clipping of a config, and nothing around it."""
    optimizer = build_optimizer(model, config.optimizer)

    def take(batch: Tensors) -> None:
        loss_of(batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.training.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()

    return take


def our_model(config: RunConfig, vocab_size: int = VOCAB_SIZE) -> nn.Module:
    """The model of a run."""
    return RECIPES[config.model.type].build_model(config.model, config.layer, config.objective, vocab_size)


def stock_model(config: RunConfig) -> nn.Module:
    """`transformers`' model of the same size."""
    from transformers import BertConfig, BertForPreTraining  # seconds to import

    shared = config.model.model_dump(
        include={
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "hidden_act",
            "hidden_dropout_prob",
            "attention_probs_dropout_prob",
            "max_position_embeddings",
        }
    )
    model: nn.Module = BertForPreTraining(BertConfig(vocab_size=VOCAB_SIZE, **shared)).train()
    return model


def stock_inputs(batch: Tensors) -> Tensors:
    """A batch of ours as the stock model takes it, without a mask."""
    labels = torch.full(batch["input_ids"].shape, -100).flatten()
    labels[batch["masked_positions"]] = batch["masked_labels"]
    return {
        "input_ids": batch["input_ids"],
        "token_type_ids": batch["token_type_ids"],
        "labels": labels.view_as(batch["input_ids"]),
        "next_sentence_label": batch["sentence_labels"],
    }


def measure_engines(arguments: argparse.Namespace, path: str) -> dict[str, Any]:
    """Median step times in seconds, sequences per second and shares of the peak, in the dtype of a run here."""
    config = engine_config(arguments, path)
    size, model = config.training.micro_batch_size, config.model
    assert size is not None
    topology = start_processes(config.reliability.hang_timeout_s)
    try:
        products = choose(config.training.precision, topology.device, [this_cpu()], products_shape(config, size))
        dtype = products.precision
        with using_cpu_libraries(products.libraries or cpu_libraries()):
            medians = engine_times(config, topology, dtype, arguments.steps, arguments.turns)
    finally:
        stop_processes()
    flop = RECIPES["bert"].flops_per_sample(model, VOCAB_SIZE, config.data.max_seq_length, predictions(config))
    peak = peak_flops(device_name(topology.device), dtype)
    return {
        "machine": machine_line(),
        "shape": f"{shape_line(config, size)}, {dtype}",
        "step_time_s": medians,
        "sequences_per_s": {row: size / value for row, value in medians.items()},
        "mfu": {row: size * flop / value / peak if peak else None for row, value in medians.items()},
        "notes": engine_notes(medians),
    }


def engine_notes(medians: dict[str, float]) -> list[str]:
    """The ratios, and what is missing."""
    stock = medians.get("transformers")
    ours = [(row, medians[row]) for row in ENGINES[:2] if row in medians]
    ratios = [f"{row} against transformers: {stock / value:.2f}x" for row, value in ours if stock]
    return [*ratios, *(f"{row}: failed" for row in ENGINES if row not in medians)]


def engine_config(arguments: argparse.Namespace, path: str) -> RunConfig:
    """The given run config with one micro-batch per step."""
    size = arguments.micro_batch_size or load_config(path).config.training.micro_batch_size
    sets = [
        f"training.train_batch_size={size}",
        f"training.micro_batch_size={size}",
        "training.gradient_accumulation_steps=null",
        "optimizer.lr=1e-4",  # that of a batch of 65,536 would take random tokens to infinity
        "load={}",
    ]
    if arguments.layers is not None:
        sets.append(f"model.num_hidden_layers={arguments.layers}")
    return load_config(path, sets).config


def engine_times(config: RunConfig, topology: Topology, dtype: Precision, steps: int, turns: int) -> dict[str, float]:
    """Median seconds per step of each model, over all steps of a turn but the first two; a row that fails is left out."""
    data = [random_step(config, seed) for seed in range(min(4, steps))]
    makers = dict(zip(ENGINES, (_ours, functools.partial(_ours, cuda_graph=True), _theirs), strict=True))
    takes: dict[str, Callable[[int], object]] = {}
    times: dict[str, list[float]] = {row: [] for row in makers}
    for row, make in makers.items():
        with _losing(row, takes, times):
            takes[row] = make(config, topology, dtype, data)
            takes[row](0)
    for _ in range(turns):
        for row in list(times):
            with _losing(row, takes, times):
                for step in range(steps):
                    if step == WARMUP_STEPS:
                        synchronize(topology.device)
                        started_s = time.perf_counter()
                    takes[row](step % len(data))
                synchronize(topology.device)
                times[row].append((time.perf_counter() - started_s) / (steps - WARMUP_STEPS))
    return {row: statistics.median(values) for row, values in times.items()}


@contextlib.contextmanager
def _losing(row: str, *rows: dict[str, Any]) -> Iterator[None]:
    """Takes a row out of all dicts if the block fails, in whatever way: the other rows go on, and its memory is theirs."""
    try:
        yield
    except Exception:
        traceback.print_exc()
        for given in rows:
            given.pop(row, None)


def engine_of(config: RunConfig, topology: Topology, dtype: Precision, make: Callable[..., nn.Module]) -> Any:
    """Return an engine as a run has it, around the model that `make` gives for the config."""
    ds_config = deepspeed_config(config, solve_batch(config.training, topology.num_replicas), dtype)
    with topology.device:  # where drawing the first weights takes no time
        model = make(config)
    optimizer = build_optimizer(model, config.optimizer, precision=dtype)
    return build_engine(model, optimizer, ds_config, topology)


def _ours(
    config: RunConfig, topology: Topology, dtype: Precision, data: list[StepData], cuda_graph: bool = False
) -> Callable[[int], object]:
    layer = config.layer.model_copy(update={"cuda_graph": cuda_graph})
    engine = engine_of(config.model_copy(update={"layer": layer}), topology, dtype, our_model)
    return lambda index: train_step(engine, data[index], topology)


def _theirs(config: RunConfig, topology: Topology, dtype: Precision, data: list[StepData]) -> Callable[[int], object]:
    engine = engine_of(config, topology, dtype, stock_model)
    inputs = [
        {name: tensor.to(topology.device) for name, tensor in stock_inputs(dict(one.micro_batches[0])).items()}
        for one in data
    ]

    def take(index: int) -> None:
        engine.backward(engine(**inputs[index]).loss)
        engine.step()

    return take


def predictions(config: RunConfig) -> int:
    """Masked positions of one sequence of full length."""
    length, most = config.data.max_seq_length, config.objective.max_predictions_per_seq
    return most or math.ceil(config.objective.mlm_probability * length)


def random_step(config: RunConfig, seed: int, vocab_size: int = VOCAB_SIZE) -> StepData:
    """One micro-batch of random tokens without padding, as the loader hands it to a step."""
    recipe, length, size = RECIPES["bert"], config.data.max_seq_length, config.training.micro_batch_size
    assert size is not None
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(vocab_size, (size, length), generator=generator)
    places = torch.rand(size, length, generator=generator).argsort(1)[:, : predictions(config)].sort(1).values
    masked = (places + length * torch.arange(size)[:, None]).flatten()
    batch = {
        "input_ids": input_ids,
        "token_type_ids": (torch.arange(length) >= length // 2).long().repeat(size, 1),
        "attention_mask": torch.ones(size, length, dtype=torch.bool),
        "masked_positions": masked,
        "masked_labels": input_ids.flatten()[masked],
        "sentence_labels": torch.randint(2, (size,), generator=generator),
    }
    counts, real_tokens = recipe.loss_counts(batch, config.objective), recipe.real_tokens(batch)
    if torch.cuda.is_available():
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    return StepData([batch], counts, real_tokens)


def table(result: dict[str, Any]) -> str:
    """The figures for a person."""
    mfu = result.get("mfu", {})
    lines = [f"{result['shape']}; {result['machine']}", f"{'':14}{'s/step':>9}{'seq/s':>9}" + f"{'MFU':>9}" * bool(mfu)]
    for name, seconds in result["step_time_s"].items():
        share = f"{mfu[name]:9.1%}" if mfu.get(name) else f"{'n/a':>9}" * bool(mfu)
        lines.append(f"{name:14}{seconds:9.4f}{result['sequences_per_s'][name]:9.2f}{share}")
    return "\n".join([*lines, *result["notes"]])


if __name__ == "__main__":
    main()
