"""Which optimizer and learning rate bring a model to a loss soonest: real runs of xformer-train, one after the other.

  python scripts/bench/compare_optimizers.py char_gpt --train a.txt --validation b.txt --steps 2000 \\
      adamw=1e-3 muon=1e-2:550 --out curves.json --plot curves.svg

A model is one of MODELS below: a run config of configs/ with other keys. A run is written as the type of its optimizer, `=`,
its lr, and `:` with its steps where they are not --steps; what else an optimizer takes stands in OPTIMIZERS. The time of a run
is that of its steps, without evaluations. Prints, for each run, its last validation loss, its time, and the steps and seconds
to the last loss of the first run. --plot needs matplotlib: validation loss by seconds, the best run of each optimizer.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from bench_device import machine_line

_LOOKS = 40  # at the validation loss, in a run
CONFIGS = Path(__file__).parents[2] / "configs"
MODELS = {
    # The CPU run of nanoGPT's README, character by character.
    "char_gpt": (
        "gpt_tiny",
        [
            "model.num_hidden_layers=4",
            "model.num_attention_heads=4",
            "model.max_position_embeddings=64",
            "tokenizer.type=bytes",
            "data.max_seq_length=64",
            "training.train_batch_size=12",
            "schedule={type: cosine, warmup_steps: 100, min_lr: 1e-4}",
        ],
    ),
    "bert_tiny": ("bert_tiny", ["objective.sentence_task=none"]),
    "bert_6x384": (
        "bert_tiny",
        [
            "model.hidden_size=384",
            "model.num_hidden_layers=6",
            "model.num_attention_heads=6",
            "model.intermediate_size=1536",
            "model.initializer_range=0.05",
            "tokenizer.vocab_size=4096",
            "data.max_seq_length=64",
            "training.train_batch_size=32",
            "objective.sentence_task=none",
        ],
    ),
}
OPTIMIZERS = {
    "adamw": "{type: adamw, lr: %s, betas: [0.9, 0.99], weight_decay: 0.1}",
    "lamb": "{type: lamb, lr: %s, betas: [0.9, 0.99], weight_decay: 0.1}",
    "muon": "{type: muon, lr: %s, adamw_lr: 2e-3, betas: [0.9, 0.99], weight_decay: 0.1, newton_schulz_dtype: bf16}",
}


@dataclass(frozen=True)
class Curve:
    """A finished run. looks: (step, seconds of training, validation loss) of each evaluation."""

    optimizer: str
    lr: str
    looks: list[tuple[int, float, float]]

    def first_at(self, loss: float) -> tuple[float, float] | None:
        """Return the step and the seconds at which the validation loss first was `loss`, between two looks by a line."""
        for (step, seconds, before), (next_step, next_seconds, after) in zip(self.looks, self.looks[1:], strict=False):
            if after <= loss < before:
                part = (before - loss) / (before - after)
                return step + part * (next_step - step), seconds + part * (next_seconds - seconds)
        return None


def run(model: str, optimizer: str, lr: str, steps: int, arguments: argparse.Namespace) -> Curve:
    """Train one run from its start to its end."""
    base, sets = MODELS[model]
    sets = [
        *sets,
        f"optimizer={OPTIMIZERS[optimizer] % lr}",
        f"data.sources=[{{kind: text, path: {arguments.train}}}]",
        f"data.validation=[{{kind: text, path: {arguments.validation}}}]",
        "data.validation_fraction=0",
        f"training.max_steps={steps}",
        f"eval={{every_steps: {max(1, steps // _LOOKS)}, batches: {arguments.batches}}}",
        "checkpoint.save_every_steps=null",
        "logging={every_steps: 10, tensorboard: false}",
        *arguments.set,
    ]
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "xformer_train", "--config", str(CONFIGS / f"{base}.yaml")]
        command += ["--output_dir", folder, *(word for one in sets for word in ("--set", one))]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{optimizer} at lr {lr} ended with {done.returncode}:\n{done.stdout[-2000:]}")
        rows = [json.loads(line) for line in next(Path(folder).glob("*/metrics.jsonl")).read_text().splitlines()]
    looks: list[tuple[int, float, float]] = []
    seconds, last = 0.0, 0
    for row in rows:
        if "val_loss" in row:
            looks.append((row["step"], seconds, row["val_loss"]))
        else:
            seconds, last = seconds + row["step_time_s"] * (row["step"] - last), row["step"]
    return Curve(optimizer, lr, looks)


def best_of_each(curves: list[Curve]) -> list[Curve]:
    """Return the run of each optimizer that ends with the lowest loss."""
    found: dict[str, Curve] = {}
    for one in sorted(curves, key=lambda one: one.looks[-1][2]):
        found.setdefault(one.optimizer, one)
    return list(found.values())


def plot(curves: list[Curve], title: str, path: Path) -> None:
    """Draw validation loss by seconds of training."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for one in curves:
        axes.plot([s for _, s, _ in one.looks], [loss for *_, loss in one.looks], label=f"{one.optimizer}, lr {one.lr}")
    axes.set(xlabel="seconds of training", ylabel="validation loss", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("optimizers", nargs="+", metavar="type=lr[:steps]")
    parser.add_argument("--train", type=Path, required=True, help="text file")
    parser.add_argument("--validation", type=Path, required=True, help="text file")
    parser.add_argument("--steps", type=int, required=True, help="of a run")
    parser.add_argument("--batches", type=int, default=40, help="of validation text at each look")
    parser.add_argument(
        "--set", action="append", default=[], help="further keys of all run configs, as xformer-train takes"
    )
    parser.add_argument("--out", type=Path, help="where to write the curves as JSON")
    parser.add_argument("--plot", type=Path, help="where to draw them, .svg")
    arguments = parser.parse_args()
    curves: list[Curve] = []
    for text in arguments.optimizers:
        optimizer, _, rest = text.partition("=")
        lr, _, steps = rest.partition(":")
        curves.append(run(arguments.model, optimizer, lr, int(steps or arguments.steps), arguments))
        goal = curves[0].looks[-1][2]
        if len(curves) == 1:
            print(f"{machine_line()}\n| optimizer | lr | loss | seconds | steps to {goal:.3f} | seconds to it |")
            print("|---|---|---|---|---|---|")
        _, seconds, loss = curves[-1].looks[-1]
        there = curves[-1].first_at(goal)
        reached = "never | never" if there is None else f"{there[0]:,.0f} | {there[1]:.1f}"
        print(f"| {optimizer} | {lr} | {loss:.3f} | {seconds:.1f} | {reached} |", flush=True)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"machine": machine_line(), "curves": [asdict(one) for one in curves]}))
    if arguments.plot is not None:
        plot(best_of_each(curves), arguments.model, arguments.plot)


if __name__ == "__main__":
    main()
