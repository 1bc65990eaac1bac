"""What `data.packing: best_fit` gives and costs: how full rows are, the time of a batch, the time to pack a large table.

Times are seconds of the processor, the best of some rounds. The lengths of the large table are log-normal, half of them below a
quarter of a row.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a file or folder; default the text inside Python")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512])
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
            print(f"  {arguments.samples:,} samples packed and written in {table_s(arguments.samples, length):.2f} s")


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


def table_s(samples: int, length: int) -> float:
    """Seconds to pack a table and to write it."""
    drawn = np.random.default_rng(0).lognormal(np.log(length / 4), 0.8, samples)
    spans, starts = np.clip(drawn, 1, length - 2).astype(np.uint32), np.zeros(samples, dtype=np.int64)

    def pack() -> None:
        with tempfile.TemporaryDirectory() as folder:
            open_packed(Path(folder) / "samples" / "packed", starts, spans, length, "", lambda _: None)

    return best_s(pack, 3)


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
