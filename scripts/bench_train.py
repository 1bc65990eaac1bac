"""What the training loop costs, and what it gains over `transformers`, in one run on one CPU.

Three ways to train the same BERT on the same batches, in turns within one process:
  loop          xformer-train itself, from config to last step (time in steps, as metrics.jsonl has it)
  bare          forward, backward, clipping and optimizer step of the same model, nothing around it
  transformers  BertForPreTraining as it comes, with the labels of every position, and the same optimizer

Prints a table and writes JSON. Figures are medians over the steps of all turns but each turn's first two.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xformer_train.launcher.config import RunConfig
from xformer_train.launcher.config_loading import LoadedConfig, load_config
from xformer_train.launcher.optim import build_optimizer
from xformer_train.launcher.topology import quiet
from xformer_train.recipes import RECIPES
from xformer_train.recipes.data import prepare_data
from xformer_train.recipes.tokenizer import load_tokenizer

WARMUP_STEPS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/bert_base.yaml")
    parser.add_argument("--layers", type=int, help="fewer layers than the config has, to be done sooner")
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6, help="steps of one turn, the first two not counted")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    arguments = parser.parse_args()
    if torch.cuda.is_available():
        raise SystemExit("this benchmark compares fp32 on a CPU; hide the GPUs with CUDA_VISIBLE_DEVICES=")
    quiet(debug=False)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments, Path(folder))
    print(table(result))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Median step times in seconds, sequences per second and ratios."""
    loaded = bench_config(arguments, folder)
    config = loaded.config
    times: dict[str, list[float]] = {"loop": [], "bare": [], "transformers": []}
    # The first turn of the loop makes tokenizer and data, which the others then read.
    times["loop"] += loop_turn(bench_config(arguments, folder, name="turn0"))
    batches, vocab_size = read_batches(config, folder / "turn0" / "tokenizer", arguments.steps)
    turns = {
        "bare": bare_turn(config, vocab_size),
        "transformers": transformers_turn(config, vocab_size),
    }
    for turn in range(arguments.turns):
        for name, take in turns.items():
            times[name] += timed(take, batches)
        if turn:
            times["loop"] += loop_turn(bench_config(arguments, folder, name=f"turn{turn}"))
    medians = {name: statistics.median(values) for name, values in times.items()}
    size = arguments.micro_batch_size
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "shape": f"{config.model.num_hidden_layers} layers, hidden {config.model.hidden_size}, vocabulary {vocab_size}, "
        f"{size} sequences of {config.data.max_seq_length}",
        "step_time_s": medians,
        "sequences_per_s": {name: size / value for name, value in medians.items()},
        "loop_overhead": medians["loop"] / medians["bare"] - 1,
        "speedup_over_transformers": medians["transformers"] / medians["loop"],
    }


def bench_config(arguments: argparse.Namespace, folder: Path, name: str = "bench") -> LoadedConfig:
    """The given run config on the built-in corpus, at the benchmark's batch, a few steps long."""
    sets = [
        "data.sources=[{kind: builtin}]",
        "data.validation_fraction=0.0",
        f"data.cache_dir={folder / 'cache'}",
        "tokenizer={vocab_size: 8192}",
        "model.vocab_size=30528",
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
    return load_config(arguments.config, sets)


def loop_turn(loaded: LoadedConfig) -> list[float]:
    """Seconds of each counted step of one whole run."""
    from xformer_train.launcher.train import run  # imports DeepSpeed, which `quiet` must precede

    run(loaded, resume=False)
    path = Path(loaded.config.output_dir) / loaded.config.name / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    size = loaded.config.training.train_batch_size
    assert size is not None
    return [size / row["seq_per_s"] for row in rows if "seq_per_s" in row][WARMUP_STEPS:]


def read_batches(config: RunConfig, tokenizer: Path, steps: int) -> tuple[list[dict[str, torch.Tensor]], int]:
    """The batches that the loop trains on, and the rows of the embedding."""
    data = prepare_data("bert", load_tokenizer(tokenizer), config.data, config.objective, config.seed, lambda _: None)
    size = config.training.train_batch_size
    assert size is not None
    assert isinstance(config.model.vocab_size, int)
    positions = np.arange(steps * size).reshape(steps, size)
    return [data.train.batch(row) for row in positions], config.model.vocab_size


def timed(take: Callable[[dict[str, torch.Tensor]], None], batches: list[dict[str, torch.Tensor]]) -> list[float]:
    """Seconds of each counted step."""
    seconds = []
    for batch in batches:
        started_s = time.perf_counter()
        take(batch)
        seconds.append(time.perf_counter() - started_s)
    return seconds[WARMUP_STEPS:]


def bare_turn(config: RunConfig, vocab_size: int) -> Callable[[dict[str, torch.Tensor]], None]:
    """A step of our model with nothing around it."""
    recipe = RECIPES["bert"]
    model = recipe.build_model(config.model, config.layer, config.objective, vocab_size)

    def loss_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        sums, counts = model(**batch), recipe.loss_counts(batch, config.objective)
        return sum((sums[part] / counts[part] for part in sums), torch.zeros(()))

    return _step(model, config, loss_of)


def transformers_turn(config: RunConfig, vocab_size: int) -> Callable[[dict[str, torch.Tensor]], None]:
    """A step of the stock model on the same batch."""
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
    model = BertForPreTraining(BertConfig(vocab_size=vocab_size, **shared)).train()

    def loss_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        labels = torch.full(batch["input_ids"].shape, -100).flatten()
        labels[batch["masked_positions"]] = batch["masked_labels"]
        loss: torch.Tensor = model(
            input_ids=batch["input_ids"],
            token_type_ids=batch["token_type_ids"],
            attention_mask=batch["attention_mask"].long(),
            labels=labels.view_as(batch["input_ids"]),
            next_sentence_label=batch["sentence_labels"],
        ).loss
        return loss

    return _step(model, config, loss_of)


def _step(
    model: torch.nn.Module, config: RunConfig, loss_of: Callable[[dict[str, torch.Tensor]], torch.Tensor]
) -> Callable[[dict[str, torch.Tensor]], None]:
    optimizer = build_optimizer(model, config.optimizer)

    def take(batch: dict[str, torch.Tensor]) -> None:
        loss_of(batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.training.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()

    return take


def table(result: dict[str, Any]) -> str:
    """The figures for a person."""
    lines = [
        f"{result['shape']}; {result['machine']}, torch {result['torch']}, {result['date']}",
        f"{'':14}{'s/step':>9}{'seq/s':>9}",
    ]
    for name, seconds in result["step_time_s"].items():
        lines.append(f"{name:14}{seconds:9.3f}{result['sequences_per_s'][name]:9.2f}")
    lines.append(f"loop over bare model: {result['loop_overhead']:+.1%}")
    lines.append(f"loop against transformers: {result['speedup_over_transformers']:.2f}x")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
