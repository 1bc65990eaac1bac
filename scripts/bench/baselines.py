"""Whether a finished run learned more than counting would: its held-out loss against unigram or bigram counts.

  python scripts/bench/baselines.py runs/bert_tiny runs/gpt_tiny

BERT: the masked-token loss against the unigram entropy of the training tokens. GPT: the next-token loss against a bigram
model with Kneser-Ney smoothing (discount 0.75), fitted on the same training tokens and scored on the same held-out tokens.
Exits with 1 if BERT is not 15 % below the entropy or GPT not below the bigram model.
"""

import json
import sys
from pathlib import Path

import numpy as np

from xformer_train.launcher.config.loading import load_config
from xformer_train.recipes import RECIPES
from xformer_train.recipes.data.stream import SampleStream, prepare_data
from xformer_train.recipes.data.tokenizer import load_tokenizer

DISCOUNT = 0.75
ROWS = 256  # samples read at a time


def main() -> int:
    results = [compare(Path(argument)) for argument in sys.argv[1:]]
    return 0 if results and all(results) else 1


def compare(run: Path) -> bool:
    """Prints one run's comparison; true if it learned enough."""
    config = load_config(run / "config.resolved.yaml").config
    tokenizer = load_tokenizer(run / "tokenizer")
    recipe = RECIPES[config.model.type]
    data = prepare_data(recipe, tokenizer, config.data, config.objective, config.seed, lambda _: None)
    assert data.validation is not None, "the run has held-out data"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "val_loss" in row][-1]
    if config.model.type == "bert":
        tokens = np.concatenate([batch["input_ids"][batch["attention_mask"]].numpy() for batch in unmasked(data.train)])
        tokens = tokens[~np.isin(tokens, tokenizer.special_ids)]
        shares = np.unique(tokens, return_counts=True)[1] / len(tokens)
        baseline = float(-(shares * np.log(shares)).sum())
        loss, wanted, name = last.get("val_mlm", last["val_loss"]), 0.85 * baseline, "unigram entropy"
    else:
        baseline = bigram_loss(pairs(data.train), pairs(data.validation), tokenizer.vocab_size)
        loss, wanted, name = last["val_loss"], baseline, "bigram model"
    print(f"{run}: held-out {loss:.3f} at step {last['step']}, {name} {baseline:.3f} ({loss / baseline - 1:+.1%})")
    return bool(loss < wanted)


def unmasked(stream: SampleStream):
    """The batches of one epoch with the masked tokens put back."""
    for first in range(0, stream.num_samples, ROWS):
        batch = stream.batch(np.arange(first, min(first + ROWS, stream.num_samples)))
        batch["input_ids"].view(-1)[batch["masked_positions"]] = batch["masked_labels"]
        yield batch


def pairs(stream: SampleStream) -> tuple[np.ndarray, np.ndarray]:
    """(token, next token) of every prediction of one epoch."""
    found = []
    for first in range(0, stream.num_samples, ROWS):
        batch = stream.batch(np.arange(first, min(first + ROWS, stream.num_samples)))
        kept = batch["labels"] >= 0
        found.append((batch["input_ids"][kept].numpy(), batch["labels"][kept].numpy()))
    return np.concatenate([a for a, _ in found]), np.concatenate([b for _, b in found])


def bigram_loss(
    train: tuple[np.ndarray, np.ndarray], held_out: tuple[np.ndarray, np.ndarray], vocab_size: int
) -> float:
    """Mean -log p(next | token) on the held-out pairs. Source: Kneser and Ney, 1995, interpolated form."""
    codes, counts = np.unique(train[0].astype(np.int64) * vocab_size + train[1], return_counts=True)
    left, right = codes // vocab_size, codes % vocab_size
    totals = np.bincount(left, counts, vocab_size)
    kinds = np.bincount(left, minlength=vocab_size)  # different tokens seen after each
    continuation = (np.bincount(right, minlength=vocab_size) + 0.5) / (len(codes) + 0.5 * vocab_size)
    wanted = held_out[0].astype(np.int64) * vocab_size + held_out[1]
    places = np.minimum(np.searchsorted(codes, wanted), len(codes) - 1)
    seen = np.where(codes[places] == wanted, counts[places], 0)
    total = totals[held_out[0]]
    backoff = np.where(total > 0, DISCOUNT * kinds[held_out[0]] / np.maximum(total, 1), 1.0)
    p = np.maximum(seen - DISCOUNT, 0) / np.maximum(total, 1) + backoff * continuation[held_out[1]]
    return float(-np.log(p).mean())


if __name__ == "__main__":
    sys.exit(main())
