"""Loss curves of bert_tiny and gpt_tiny with our layer and with a plain torch layer, for tests/golden.

  python scripts/bench/golden_curves.py

Both models train for 200 steps as configs/bert_tiny.yaml and gpt_tiny.yaml say, but with dropout, and on made-up text read
as bytes: the built-in text is another one in every version of Python. A seed gives the weights to start from and the
dropout; the batches are the same in all runs. The loop is the launcher's without DeepSpeed. Writes one JSON file per model
and prints the losses in windows; takes half an hour. Run it again when the masks of dropout, the start of the
weights, the samples or either config changed on purpose.
"""

import argparse
import json
import platform
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xformer_train.kernels import AttentionMask, TransformerLayer
from xformer_train.launcher.config.batch import solve_batch
from xformer_train.launcher.config.loading import load_config
from xformer_train.launcher.config.schema import RunConfig
from xformer_train.launcher.optim.optimizer import build_optimizer
from xformer_train.launcher.optim.schedule import learning_rate
from xformer_train.launcher.training.steps import read_step, step_positions
from xformer_train.recipes import RECIPES
from xformer_train.recipes.data.stream import PreparedData, prepare_data
from xformer_train.recipes.data.tokenizer import build_tokenizer

ROOT = Path(__file__).parents[2]
NAMES = ("bert_tiny", "gpt_tiny")
STEPS = 200
SEEDS = range(12)
WINDOW = 20  # steps that are averaged where curves are compared


class PlainLayer(TransformerLayer):
    """The same parameters from the same start, computed by torch's own functions; no code of ours runs in it."""

    def forward(self, hidden_states: Tensor, mask: AttentionMask | None = None, **_: Any) -> Tensor:
        """(B, S, H) from (B, S, H); what a stack gives its layers besides is of no use here."""
        assert mask is not None, "the models always give one"
        if self.config.pre_layer_norm:
            x = hidden_states + self._attention_half(self.attention_norm(hidden_states), mask)
            return x + self._mlp_half(self.mlp_norm(x))
        x = self.attention_norm(hidden_states + self._attention_half(hidden_states, mask))
        return self.mlp_norm(x + self._mlp_half(x))

    def _attention_half(self, x: Tensor, mask: AttentionMask) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.config.num_attention_heads, -1)).permute(2, 0, 3, 1, 4)
        p = self.config.attention_probs_dropout_prob if self.training else 0.0
        context = F.scaled_dot_product_attention(q, k, v, visible(mask, x.shape[1]), dropout_p=p)
        return self._dropped(self.attention_output(context.transpose(1, 2).flatten(2)))

    def _mlp_half(self, x: Tensor) -> Tensor:
        approximation = "tanh" if self.config.hidden_act == "gelu_tanh" else "none"
        return self._dropped(self.output(F.gelu(self.intermediate(x), approximate=approximation)))

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.hidden_dropout_prob, self.training)


def visible(mask: AttentionMask, size: int) -> Tensor:
    """Which keys each query may see, bool (B or 1, 1, S or 1, S)."""
    allowed = torch.ones(1, 1, size, size, dtype=torch.bool)
    if mask.causal:
        allowed = allowed.tril()
    if mask.key_mask is not None:
        allowed = allowed & mask.key_mask[:, None, None, :]
    if mask.segment_ids is not None:
        allowed = allowed & (mask.segment_ids[:, None, :, None] == mask.segment_ids[:, None, None, :])
    return allowed


@dataclass(frozen=True)
class GoldenTask:
    """What is trained, the same for every seed and layer."""

    config: RunConfig
    data: PreparedData

    @property
    def facts(self) -> dict[str, Any]:
        """What must be equal for two curves to be comparable, as JSON values: the keys that are set, and the samples."""
        sections = {"model", "objective", "optimizer", "schedule", "training"}
        settings = self.config.model_dump(mode="json", include=sections, exclude_unset=True)
        return {**settings, "data_fingerprint": self.data.fingerprint}


def open_task(name: str, folder: Path, dropout: float = 0.1) -> GoldenTask:
    """The task of one name; its text and prepared data are kept in `folder`."""
    text = folder / "text.txt"
    if not text.exists():
        text.write_text(made_up_text())
    sets = [
        f"data.sources=[{{kind: text, path: {text}}}]",
        f"data.cache_dir={folder / 'cache'}",
        "tokenizer={type: bytes}",
        "model.vocab_size=320",
        f"model.hidden_dropout_prob={dropout}",
        f"model.attention_probs_dropout_prob={dropout}",
        f"training.max_steps={STEPS}",
    ]
    config = load_config(ROOT / "configs" / f"{name}.yaml", sets).config
    recipe = RECIPES[config.model.type]
    tokenizer = build_tokenizer(recipe, config.tokenizer, config.data, lambda _: None)
    data = prepare_data(recipe, tokenizer, config.data, config.objective, config.seed, lambda _: None)
    return GoldenTask(config, data)


def made_up_text(documents: int = 1500) -> str:
    """Documents of sentences over 20 invented words: to predict a letter, the letters around it must be looked at."""
    random = np.random.RandomState(0)  # the one generator of numpy whose numbers never change between versions
    letters = np.array(list("etaoinshrdlu"))
    words = ["".join(random.choice(letters, size)) for size in random.randint(2, 9, 20)]

    def sentence() -> str:
        return " ".join(words[i] for i in random.randint(0, len(words), random.randint(3, 10))) + "."

    return "\n\n".join(" ".join(sentence() for _ in range(8)) for _ in range(documents)) + "\n"


def loss_curve(task: GoldenTask, seed: int, steps: int = STEPS, *, plain: bool = False) -> list[float]:
    """The training loss of each of the first `steps` steps, all parts of it added."""
    config, stream = task.config, task.data.train
    recipe, batch = RECIPES[config.model.type], solve_batch(config.training, num_replicas=1)
    assert isinstance(config.model.vocab_size, int), "open_task sets it"
    torch.manual_seed(seed)
    model = recipe.build_model(config.model, config.layer, config.objective, config.model.vocab_size)
    if plain:
        for index, layer in enumerate(model.layers):
            model.layers[index] = plain_copy(layer)
    optimizer = build_optimizer(model, config.optimizer)
    torch.manual_seed(seed)  # what is drawn from now on is dropout
    losses = []
    for step in range(steps):
        positions = step_positions(step * batch.train_batch_size, batch, replica=0)
        data = read_step(stream, positions, lambda b: recipe.loss_counts(b, config.objective), recipe.real_tokens)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.schedule, config.optimizer.lr, STEPS, step)
        sums = model(**data.micro_batches[0])
        loss = sum((sums[part] / count for part, count in data.counts.items()), torch.zeros(()))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.training.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def plain_copy(layer: TransformerLayer) -> PlainLayer:
    """A PlainLayer with the weights of `layer`."""
    copy = PlainLayer(layer.config)
    copy.load_state_dict(layer.state_dict())
    return copy


def windows(curves: list[list[float]]) -> np.ndarray:
    """Means over windows of steps, (curves, windows)."""
    return np.array(curves).reshape(len(curves), -1, WINDOW).mean(2)


def measure(name: str) -> dict[str, Any]:
    """The contents of one golden file."""
    with tempfile.TemporaryDirectory() as folder:
        task = open_task(name, Path(folder))
        ours, plain = (
            [[round(loss, 6) for loss in loss_curve(task, seed, plain=is_plain)] for seed in SEEDS]
            for is_plain in (False, True)
        )
    processor = f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
    return {
        "made": {
            "date": time.strftime("%Y-%m-%d"),
            "torch": torch.__version__,
            "machine": f"{processor}, {torch.get_num_threads()} threads",
        },
        "facts": task.facts,
        "windows": {
            "steps": WINDOW,
            "ours_mean": windows(ours).mean(0).round(4).tolist(),
            "ours_spread": windows(ours).std(0, ddof=1).round(4).tolist(),
            "plain_mean": windows(plain).mean(0).round(4).tolist(),
        },
        "ours": ours,
        "plain": plain,
    }


def as_json(content: dict[str, Any]) -> str:
    """JSON with every list of numbers on one line."""
    return re.sub(r"(?<=[\d\[,])\n *(?=[\d\]])", "", json.dumps(content, indent=1)) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "golden", help="folder of the JSON files")
    arguments = parser.parse_args()
    for name in NAMES:
        content = measure(name)
        (arguments.out / f"{name}.json").write_text(as_json(content))
        print(f"{name}, mean loss of {WINDOW} steps\n{'steps':>9}{'ours':>9}{'spread':>9}{'plain':>9}")
        columns = (content["windows"][key] for key in ("ours_mean", "ours_spread", "plain_mean"))
        for number, row in enumerate(zip(*columns, strict=True)):
            span = f"{number * WINDOW}-{(number + 1) * WINDOW}"
            print(f"{span:>9}" + "".join(f"{value:9.4f}" for value in row))


if __name__ == "__main__":
    main()
