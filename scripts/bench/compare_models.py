"""Which of several models learns a text fastest: they train in turns in one process, each for the same number of minutes.

  python scripts/bench/compare_models.py classic_bert modern_bert --train a.txt --validation b.txt --minutes 10

A name is one of MODELS below: a run config of configs/ with other sizes, all about as large. The learning rate stays constant
after its warm-up, so that the loss at every moment is that of a run which may end there. A turn is --turn seconds of training;
the validation loss is taken after each turn and its time is not counted. Prints and writes, for each model, its speed and its
validation loss at equal tokens (those of the slowest) and at equal minutes.
"""

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_device import machine_line
from torch import nn

from xformer_train.launcher.config.batch import BatchPlan, solve_batch
from xformer_train.launcher.config.loading import load_config
from xformer_train.launcher.config.schema import RunConfig
from xformer_train.launcher.optim.optimizer import build_optimizer
from xformer_train.launcher.optim.schedule import learning_rate
from xformer_train.launcher.processes.topology import Topology, quiet, start_processes, stop_processes
from xformer_train.launcher.training.steps import evaluate, read_step, step_positions
from xformer_train.recipes import RECIPES
from xformer_train.recipes.data.stream import PreparedData, prepare_data
from xformer_train.recipes.data.tokenizer import build_tokenizer

CONFIGS = Path(__file__).parents[2] / "configs"
_SIZE = [
    "model.hidden_size=384",
    "model.num_hidden_layers=6",
    "model.num_attention_heads=6",
    "tokenizer.vocab_size=4096",
]
_CLASSIC = [*_SIZE, "model.intermediate_size=1536"]
_MODERN = [*_SIZE, "model.intermediate_size=1024"]  # a gate makes it 3 H F in place of 2 H F parameters
_BERT = ["objective.sentence_task=none", "objective.mlm_probability=0.3", "training.train_batch_size=32"]
_GPT = ["training.train_batch_size=16"]
_BATCHES = 10  # of validation text at each look
_COMMON = [
    "data.max_seq_length=128",
    "model.max_position_embeddings=128",
    "model.initializer_range=0.04",
    "optimizer={type: adamw, lr: 1e-3, betas: [0.9, 0.98], weight_decay: 0.1}",
    "schedule={type: constant, warmup_steps: 50}",
]
MODELS = {
    "classic_bert": ("bert_tiny", [*_CLASSIC, *_BERT]),
    "modern_bert": ("modernbert_tiny", [*_MODERN, *_BERT, "model.sliding_window=64"]),
    "classic_gpt": ("gpt_tiny", [*_CLASSIC, *_GPT]),
    "modern_gpt": ("llama_tiny", [*_MODERN, *_GPT, "model.num_key_value_heads=2", "model.intermediate_size=1195"]),
}


@dataclass
class Contender:
    """A model in training. seconds: of training alone, as are those of `curve`: (seconds, steps, tokens, validation loss)."""

    name: str
    config: RunConfig
    data: PreparedData
    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: BatchPlan
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[tuple[float, int, int, float]] = field(default_factory=list)

    def turn(self, seconds: float) -> None:
        """Train for so many seconds."""
        started, end = time.perf_counter(), 0.0
        while end < seconds:
            self._step()
            end = time.perf_counter() - started
        self.seconds += end

    def _step(self) -> None:
        recipe, config = RECIPES[self.config.model.type], self.config
        positions = step_positions(self.steps * self.batch.train_batch_size, self.batch, replica=0)
        data = read_step(
            self.data.train, positions, lambda b: recipe.loss_counts(b, config.objective), recipe.real_tokens
        )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config.schedule, config.optimizer.lr, 10**9, self.steps)
        sums = self.model(**data.micro_batches[0])
        loss = sum((sums[part] / count for part, count in data.counts.items()), torch.zeros(()))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), config.training.gradient_clipping)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        self.tokens += data.real_tokens

    def look(self, topology: Topology) -> None:
        """Take the validation loss and note it."""
        recipe, validation = RECIPES[self.config.model.type], self.data.validation
        assert validation is not None, "every contender is given held-out text"
        count = lambda batch: recipe.loss_counts(batch, self.config.objective)  # noqa: E731
        losses = evaluate(self.model, validation, count, self.batch, topology, most_batches=_BATCHES)
        assert losses is not None, "nothing stops it"
        self.curve.append((self.seconds, self.steps, self.tokens, sum(losses.values())))
        print(f"{self.name:14}{self.seconds:8.0f} s{self.tokens:12,} tokens   {self.curve[-1][3]:.4f}", flush=True)

    def at(self, column: int, value: float) -> float:
        """Return the validation loss at so many seconds (column 0) or tokens (2), between two looks by a straight line."""
        return float(np.interp(value, [row[column] for row in self.curve], [row[3] for row in self.curve]))


def make_contender(name: str, arguments: argparse.Namespace) -> Contender:
    """Return a model at its start, its tokenizer trained on the training text."""
    base, sets = MODELS[name]
    texts = [
        f"data.sources=[{{kind: text, path: {arguments.train}}}]",
        f"data.validation=[{{kind: text, path: {arguments.validation}}}]",
        "data.validation_fraction=0",
    ]
    config = load_config(CONFIGS / f"{base}.yaml", [*sets, *_COMMON, *texts, *arguments.set]).config
    recipe = RECIPES[config.model.type]
    tokenizer = build_tokenizer(recipe, config.tokenizer, config.data, lambda _: None)
    data = prepare_data(recipe, tokenizer, config.data, config.objective, config.seed, lambda _: None)
    torch.manual_seed(config.seed)
    model = recipe.build_model(config.model, config.layer, config.objective, -(-tokenizer.vocab_size // 64) * 64)
    batch = solve_batch(config.training, num_replicas=1)
    return Contender(name, config, data, model, build_optimizer(model, config.optimizer), batch)


def results(contenders: list[Contender]) -> list[dict[str, Any]]:
    """Return a row of figures for each."""
    tokens, seconds = (min(one.curve[-1][column] for one in contenders) for column in (2, 0))
    return [
        {
            "model": one.name,
            "parameters": sum(parameter.numel() for parameter in one.model.parameters()),
            "tokens_per_s": one.tokens / one.seconds,
            "equal_tokens": tokens,
            "loss_at_equal_tokens": one.at(2, tokens),
            "equal_seconds": seconds,
            "loss_at_equal_minutes": one.at(0, seconds),
            "curve": one.curve,
        }
        for one in contenders
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=MODELS)
    parser.add_argument("--train", type=Path, required=True, help="text file")
    parser.add_argument("--validation", type=Path, required=True, help="text file")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training, for each model")
    parser.add_argument("--turn", type=float, default=40.0, help="seconds")
    parser.add_argument(
        "--set", action="append", default=[], help="further keys of all run configs, as xformer-train takes"
    )
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    arguments = parser.parse_args()
    quiet(debug=False)
    topology = start_processes(hang_timeout_s=600)
    contenders = [make_contender(name, arguments) for name in arguments.models]
    for one in contenders:
        one.look(topology)
    while min(one.seconds for one in contenders) < 60 * arguments.minutes:
        for one in contenders:
            one.turn(arguments.turn)
            one.look(topology)
    stop_processes()
    rows = results(contenders)
    equal = f"loss at {rows[0]['equal_tokens']:,} tokens"
    print(f"{machine_line()}\n| model | parameters | tokens/s | {equal} | loss at equal minutes |")
    print("|---|---|---|---|---|")
    for row in rows:
        losses = f"{row['loss_at_equal_tokens']:.3f} | {row['loss_at_equal_minutes']:.3f}"
        print(f"| {row['model']} | {row['parameters']:,} | {row['tokens_per_s']:,.0f} | {losses} |")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"machine": machine_line(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
