"""What `data.packing: best_fit` gives and costs: how full rows are, the time of a batch, the time to pack a large table.

Times are seconds of the processor, the best of some rounds.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from bench_device import machine_line

from xformer_train.recipes import RECIPES
from xformer_train.recipes.bert.packing import open_packed
from xformer_train.recipes.config import DataConfig, ObjectiveConfig, SourceConfig, TokenizerConfig
from xformer_train.recipes.data.stream import PreparedData, prepare_data
from xformer_train.recipes.data.tokenizer import build_tokenizer

BATCH_TOKENS, ROUNDS = 2**14, 30
SPREADS = {  # lengths of the samples of a large table, by the length of a row and the number of samples
    "log-normal, half below a quarter of a row": lambda rng, row, n: rng.lognormal(np.log(row / 4), 0.8, n),
    "any length as often": lambda rng, row, n: rng.integers(1, row, n),
    "sentences, half below 20 tokens": lambda rng, _, n: rng.lognormal(np.log(20), 0.6, n),
    "four of five as long as a row": lambda rng, row, n: np.where(rng.random(n) < 0.8, row, rng.integers(1, row, n)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a file or folder; default the text inside Python")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 8192])
    parser.add_argument("--samples", type=int, default=10_000_000, help="of the large table")
    arguments = parser.parse_args()
    source = SourceConfig(kind="text", path=str(arguments.text)) if arguments.text else SourceConfig(kind="builtin")
    print(machine_line())
    with tempfile.TemporaryDirectory() as folder:
        for length in arguments.lengths:
            padded, packed = (prepared(source, length, packing, folder) for packing in ("none", "best_fit"))
            found = packed.sizes.packing
            assert found is not None
            print(f"{length} tokens: {found}; padded, they fill {found.tokens / found.samples / length:.1%}")
            times = f"padded {1e9 * token_s(padded, length):.0f} ns, packed {1e9 * token_s(packed, length):.0f} ns"
            print(f"  a batch of {BATCH_TOKENS:,} places, for each token that is not padding: {times}")
            for spread in SPREADS:
                found_s = table(spread, arguments.samples, length)
                print(f"  {arguments.samples:,} samples, {spread}, packed and written: {found_s}")


def prepared(source: SourceConfig, length: int, packing: str, folder: str) -> PreparedData:
    """The samples of a source without a sentence task."""
    recipe, objective = RECIPES["bert"], ObjectiveConfig(sentence_task="none")
    data = DataConfig(sources=[source], max_seq_length=length, packing=packing, cache_dir=folder)  # type: ignore[arg-type]
    tokenizer = build_tokenizer(recipe, TokenizerConfig(), data, lambda _: None)
    return prepare_data(recipe, tokenizer, data, objective, 0, lambda _: None)


def token_s(data: PreparedData, length: int) -> float:
    """Seconds that a batch takes for each of its tokens."""
    positions = np.arange(max(1, BATCH_TOKENS // length))
    tokens = int(data.train.batch(positions)["attention_mask"].sum())
    return best_s(lambda: data.train.batch(positions), ROUNDS) / tokens


def table(spread: str, samples: int, length: int) -> str:
    """Seconds to pack a table and to write it, and how full its rows are."""
    drawn = SPREADS[spread](np.random.default_rng(0), length, samples)
    spans, starts = np.clip(drawn, 1, length - 2).astype(np.uint32), np.zeros(samples, dtype=np.int64)

    def pack() -> float:
        with tempfile.TemporaryDirectory() as folder:
            name = Path(folder) / "samples" / "packed"
            found = open_packed(name, starts, spans, length, "", lambda _: None).packing
        return found.tokens / found.rows / length

    return f"{best_s(pack, 3):.2f} s, full to {pack():.1%}"


def best_s(action: Callable[[], object], rounds: int) -> float:
    """Processor seconds of the quickest of some calls."""
    times = []
    for _ in range(rounds):
        started_s = time.process_time()
        action()
        times.append(time.process_time() - started_s)
    return min(times)


if __name__ == "__main__":
    main()
