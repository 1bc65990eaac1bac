"""From `data.sources` to batches: prepared once, then every batch is a pure function of the positions asked for.

A *position* counts samples from the start of training, over all epochs: position p is sample p mod N of epoch p div N.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...kernels.errors import UserError
from ..config import DataConfig, ObjectiveConfig, SourceConfig
from ..recipe import Collate, DataTask, Packing, Recipe, Report, Rows, Samples
from .cache import cache_folder
from .counter_rng import hash64, permute
from .run_tokenizer import RunTokenizer
from .sources import open_source
from .token_store import TokenStore, tokenise
from .tokenizer import check_suits

ORDER_VERSION = 1  # raise it when the same settings would give another sequence of samples

_BLOCK_TOKENS = 2**24
_LOOKED_AT = 256  # samples
_ORDER, _ORDER_IN_SOURCE, _CONTENT = range(3)


@dataclass(frozen=True)
class DataSizes:
    """What there is to train on, held-out documents not counted. packing: of all sources together, None without it."""

    documents: int
    tokens: int
    samples: int
    packing: Packing | None = None

    @property
    def unit(self) -> str:
        """What `samples` counts, as a word in the plural."""
        return "samples" if self.packing is None else "rows"


@dataclass(frozen=True)
class PreparedData:
    """fingerprint: equal if and only if the sequence of training samples is."""

    train: "SampleStream"
    validation: "SampleStream | None"
    fingerprint: str
    sizes: DataSizes


def prepare_data(
    recipe: Recipe,
    tokenizer: RunTokenizer,
    data: DataConfig,
    objective: ObjectiveConfig,
    seed: int,
    report: Report,
    *,
    unpad: bool = False,
) -> PreparedData:
    """Return training and held-out samples; what the cache does not have is prepared now, which can take long.

    unpad: batches say where their tokens stand; the samples are the same.
    Raises UserError for every fault of the sources (see `sources.py`), text too short for one sample, samples most of which
    have no token to predict, a tokenizer without the special tokens needed, a damaged cache.
    """
    check_suits(recipe, tokenizer)
    cache, rules = cache_folder(data.cache_dir), recipe.samples
    task = DataTask(tokenizer, data, objective, cache, report, unpad)

    def open_stores(sources: Sequence[SourceConfig], held_out: float) -> list[tuple[TokenStore, TokenStore]]:
        return [tokenise(open_source(one, cache), tokenizer, rules.layout, held_out, cache, report) for one in sources]

    def stream(stores: list[TokenStore], sources: Sequence[SourceConfig], stream_seed: int) -> "SampleStream":
        parts = [rules.open(store, task) for store in stores]
        return SampleStream(parts, draws_per_epoch(list(map(len, parts)), sources), rules.collate(task), stream_seed)

    stores = open_stores(data.sources, data.validation_fraction)
    train = stream([first for first, _ in stores], data.sources, seed)
    validation = None
    if data.validation:
        held_out = open_stores(data.validation, 0.0)
        validation = stream([first for first, _ in held_out], data.validation, seed)
    elif data.validation_fraction > 0:
        validation = stream([second for _, second in stores], data.sources, seed)
    _check_predictions(train, recipe, objective, "data.sources")
    if validation is not None:
        _check_predictions(validation, recipe, objective, "the validation data")
    sizes = DataSizes(
        documents=sum(first.num_documents for first, _ in stores),
        tokens=sum(len(first.tokens) for first, _ in stores),
        samples=sum(len(part) for part in train.parts),
        packing=_together([part.packing for part in train.parts if part.packing is not None]),
    )
    digests = [first.digest for first, _ in stores]
    settings = rules.settings(data, objective)
    symbols = _symbols(tokenizer, [first for first, _ in stores] if objective.masking != "subword" else [])
    facts = [ORDER_VERSION, recipe.name, digests, train.draws, settings, symbols, seed]
    fingerprint = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()
    return PreparedData(train, validation, fingerprint, sizes)


def _together(packings: Sequence[Packing]) -> Packing | None:
    if not packings:
        return None
    rows, samples, tokens = (sum(getattr(one, name) for one in packings) for name in ("rows", "samples", "tokens"))
    return Packing(rows, samples, tokens, packings[0].size)


def _check_predictions(stream: "SampleStream", recipe: Recipe, objective: ObjectiveConfig, sources: str) -> None:
    """Raise UserError if more than half of the samples, of up to 256 from all over the first epoch, have nothing to predict."""
    positions = np.unique(np.linspace(0, stream.num_samples - 1, _LOOKED_AT).astype(np.int64))
    # The first part of the loss is the one over the vocabulary.
    counts = [next(iter(recipe.loss_counts(stream.batch(one), objective).values())) for one in positions[:, None]]
    share = counts.count(0) / len(counts)
    if share > 0.5:
        raise UserError(
            f"{sources}: {share:.0%} of the samples have no token to predict, with objective.masking={objective.masking}; "
            f"choose subword where words are longer than max_predictions_per_seq, and else a tokenizer that knows this text"
        )


def _symbols(tokenizer: RunTokenizer, by_word: Sequence[TokenStore]) -> list[Any]:
    """What of the tokenizer samples depend on beside the tokens. Not its file: another version of the library writes another
    one, and a run must be continued with it."""
    specials = {name: tokenizer.tokenizer.token_to_id(token) for name, token in tokenizer.specials.items()}
    word_start = hashlib.blake2b(tokenizer.word_start.tobytes(), digest_size=16).hexdigest()
    starts, ends = tokenizer.word_borders
    borders = []
    # Where masking by words differs from what it was before `word_borders`.
    other = ends | (starts != tokenizer.word_start)
    blocks = ((store.tokens, first) for store in by_word for first in range(0, len(store.tokens), _BLOCK_TOKENS))
    if other.any() and any(other[tokens[first : first + _BLOCK_TOKENS]].any() for tokens, first in blocks):
        borders = [hashlib.blake2b(starts.tobytes() + ends.tobytes(), digest_size=16).hexdigest()]
    return [specials, tokenizer.special_ids.tolist(), word_start, *borders]


def draws_per_epoch(sizes: list[int], sources: Sequence[SourceConfig]) -> list[int]:
    """How many samples one epoch takes from each source.

    Without weights every sample once. With weights as many samples in all, shared out in proportion to the weights (largest
    remainders rounded up), so that a heavy source repeats within an epoch and a light one goes on in the next.
    """
    weights = [source.weight for source in sources if source.weight is not None]
    if not weights:
        return sizes
    exact = np.array(weights) / sum(weights) * sum(sizes)
    draws = np.floor(exact).astype(np.int64)
    largest = np.argsort(draws - exact, kind="stable")[: sum(sizes) - int(draws.sum())]
    draws[largest] += 1
    return [int(count) for count in draws]


@dataclass(frozen=True)
class SampleStream:
    """The endless sequence of samples: pass after pass over the sources, each in another order.

    draws: samples that one epoch takes from each source.
    """

    parts: Sequence[Samples]
    draws: list[int]
    collate: Collate
    seed: int

    @property
    def num_samples(self) -> int:
        """Samples of one epoch."""
        return sum(self.draws)

    def batch(self, positions: np.ndarray) -> dict[str, torch.Tensor]:
        """Return the samples at these positions, (B,) integers >= 0 in any order, as the tensors that the model takes.

        `collate` of the recipe's samples says which they are.
        """
        positions = np.asarray(positions, dtype=np.int64)
        source, index = self.locate(positions)
        keys = hash64(self.seed, _CONTENT, positions)
        if len(self.parts) == 1:
            rows: Rows = self.parts[0].rows(index, keys)
        else:
            order = np.argsort(source, kind="stable")
            found = [
                part.rows(index[source == number], keys[source == number])
                for number, part in enumerate(self.parts)
                if (source == number).any()
            ]
            back = np.argsort(order)
            rows = tuple(np.concatenate(arrays)[back] for arrays in zip(*found, strict=True))
        return {name: torch.from_numpy(array) for name, array in self.collate(rows, keys).items()}

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each position and the sample in it, (B,) int64 each; O(1) memory, whatever the number of samples."""
        draws = np.array(self.draws, dtype=np.int64)
        epoch, index = np.divmod(positions, self.num_samples)
        slot = permute(index, self.num_samples, self.seed, _ORDER, epoch)
        bounds = np.cumsum(draws)
        source = np.searchsorted(bounds, slot, side="right")
        drawn = epoch * draws[source] + slot - (bounds - draws)[source]  # counts what was drawn from this source so far
        sample = np.empty_like(drawn)
        for number, part in enumerate(self.parts):
            mine = source == number
            turn, index = np.divmod(drawn[mine], len(part))
            if self.draws[number] == len(part):  # an epoch is one turn, which `slot` has in random order already
                sample[mine] = index
            else:
                sample[mine] = permute(index, len(part), self.seed, _ORDER_IN_SOURCE, number, turn)
        return source, sample
