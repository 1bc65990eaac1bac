"""BERT samples: which stretch of text each one is, and the two segments made of it.

A sample is a run of sentences of one document, cut off where it reaches its target length. For a sentence task it is divided
in two at a sentence border; the border, the partner and what is trimmed off differ from epoch to epoch.
Source: Devlin et al., arXiv 1810.04805, and its data preparation; sentence order as in Lan et al., arXiv 1909.11942.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...kernels.errors import UserError
from ..config import DataConfig, ObjectiveConfig, SentenceTask
from ..data.cache import open_or_build, read_array
from ..data.counter_rng import below, uniform
from ..data.run_tokenizer import RunTokenizer
from ..data.token_store import TokenStore
from ..recipe import Collate, DataTask, Report, Rows
from .masking import MaskingRule, mask_rows
from .packing import PACKING_VERSION, PackedSamples, open_packed, packed_batch

TABLE_VERSION = 1  # raise it when the same store would give another table

_SHORTEST_PAIR = 2  # one token on either side
_BLOCK_SENTENCES = 2**20
_IS_SHORT, _SHORT_LENGTH = range(2)
_BORDER, _LABEL, _PARTNER, _TRIM_A, _TRIM_B = range(10, 15)  # others than in masking.py, which has the same keys
_IN_TABLE = 0  # the table is the same for every seed: one file serves all runs


@dataclass(frozen=True)
class SampleTable:
    """starts: (N,) int64, first token of each sample; spans: (N,) uint32, tokens in its sentences; targets: (N,) uint32, most
    tokens to use, special ones not counted."""

    starts: np.ndarray
    spans: np.ndarray
    targets: np.ndarray


def open_table(
    store: TokenStore, seq_length: int, short_seq_prob: float, sentence_task: SentenceTask, folder: Path, report: Report
) -> SampleTable:
    """The samples of a store, built now unless the folder is there. Raises ValueError if the text is too short for one."""
    pairs = sentence_task != "none"
    names = {"starts": "<i8", "spans": "<u4", "targets": "<u4"}

    def build(partial: Path) -> dict[str, Any]:
        blocks = _pair_samples if pairs else _single_samples
        count = 0
        with ExitStack() as stack:
            files = [stack.enter_context((partial / name).open("wb")) for name in names]
            for block in blocks(store, seq_length, short_seq_prob):
                for file, numbers, dtype in zip(files, block, names.values(), strict=True):
                    file.write(numbers.astype(dtype).tobytes())
                count += len(block[0])
        if count == 0:
            raise UserError(f"data source {store.name}: too little text for one sample; add text")
        report(f"{store.name}: {count:,} samples of up to {seq_length} tokens")
        return {"samples": count}

    open_or_build(folder, build, report)
    return SampleTable(**{name: read_array(folder / name, dtype) for name, dtype in names.items()})


Block = tuple[np.ndarray, np.ndarray, np.ndarray]


def _single_samples(store: TokenStore, seq_length: int, short_seq_prob: float) -> Iterator[Block]:
    """Documents cut into windows of seq_length - 2 tokens, some of them cut again at a random place. Nothing is left out."""
    most = seq_length - 2  # [CLS] and [SEP]
    # A cut window gives two short samples, hence fewer cuts than short samples.
    cut_probability = short_seq_prob / (2 - short_seq_prob)
    for first, last in _document_blocks(store):
        bounds = np.asarray(store.documents[first : last + 1])
        windows = -(-np.diff(bounds) // most)  # of each document
        number = np.arange(windows.sum()) - np.repeat(np.cumsum(windows) - windows, windows)
        starts = np.repeat(bounds[:-1], windows) + number * most
        cut = uniform(_IN_TABLE, _IS_SHORT, starts) < cut_probability
        spans = np.minimum(np.repeat(bounds[1:], windows) - starts, most)
        cut &= spans > 1
        middles = (starts + 1 + below(np.maximum(spans - 1, 1), _IN_TABLE, _SHORT_LENGTH, starts))[cut]
        starts = np.sort(np.concatenate([starts, middles]))
        spans = np.diff(np.append(starts, bounds[-1]))
        yield starts, spans, spans


def _pair_samples(store: TokenStore, seq_length: int, short_seq_prob: float) -> Iterator[Block]:
    """Sentences gathered until they reach the target. A sentence longer than the target itself is cut into parts."""
    most = seq_length - 3  # [CLS] and two [SEP]
    for first, last in _document_blocks(store):
        bounds = np.asarray(store.documents[first : last + 1])
        lo, hi = np.searchsorted(store.sentences, [bounds[0], bounds[-1]])
        sentences = np.asarray(store.sentences[lo : hi + 1])
        parts = -(-np.diff(sentences) // most)
        number = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
        borders = np.append(np.repeat(sentences[:-1], parts) + number * most, sentences[-1])
        starts = borders[:-1]
        short = uniform(_IN_TABLE, _IS_SHORT, starts) < short_seq_prob
        shorter = _SHORTEST_PAIR + below(most - _SHORTEST_PAIR + 1, _IN_TABLE, _SHORT_LENGTH, starts)
        targets = np.where(short, shorter, most)
        document_end = bounds[np.searchsorted(bounds, starts, side="right")]
        reached = np.searchsorted(borders, np.minimum(starts + targets, document_end))
        chosen = np.array(_follow(reached.tolist()), dtype=np.int64)
        spans = borders[reached[chosen]] - starts[chosen]
        chosen, spans = chosen[spans >= _SHORTEST_PAIR], spans[spans >= _SHORTEST_PAIR]
        yield starts[chosen], spans, targets[chosen]


def _follow(after: list[int]) -> list[int]:
    """The indices on the way 0, after[0], after[after[0]], ... to the end."""
    way, index = [], 0
    while index < len(after):
        way.append(index)
        index = after[index]
    return way


def _document_blocks(store: TokenStore) -> Iterator[tuple[int, int]]:
    """Ranges of documents of about _BLOCK_SENTENCES sentences, so that a large table is built in bounded memory."""
    first = 0
    while first < store.num_documents:
        sentence = np.searchsorted(store.sentences, store.documents[first]) + _BLOCK_SENTENCES
        token = store.sentences[min(sentence, len(store.sentences) - 1)]
        last = max(int(np.searchsorted(store.documents, token)), first + 1)
        yield first, last
        first = last


@dataclass(frozen=True)
class BertSamples:
    """Rows of one source. Raises ValueError if nsp has no second document to take partners from."""

    store: TokenStore
    table: SampleTable
    seq_length: int
    sentence_task: SentenceTask
    tokenizer: RunTokenizer
    packing = None  # a row is a sample

    def __post_init__(self) -> None:
        if self.sentence_task == "nsp" and self.store.num_documents < 2:
            why = f"takes partners from other documents, and {self.store.name} is one document"
            raise UserError(f"objective.sentence_task=nsp {why}; add text, or set sop or none")

    def __len__(self) -> int:
        return len(self.table.starts)

    def rows(self, index: np.ndarray, keys: np.ndarray) -> Rows:
        """Unmasked samples: input_ids (B, S), token_type_ids (B, S), lengths (B,), sentence labels (B,), all int64.

        index: (B,) in [0, len); keys: (B,) uint64 that decide border, label, partner and trimming.
        """
        S, special = self.seq_length, self.tokenizer.special_id
        start, span = self.table.starts[index], self.table.spans[index].astype(np.int64)
        target = self.table.targets[index].astype(np.int64)
        columns = np.arange(S)
        if self.sentence_task == "none":
            a, a_length = start[:, None], span[:, None]
            b, b_length = np.zeros_like(a), np.full_like(a, -1)  # no second [SEP] either
            labels = np.zeros(len(index), dtype=np.int64)
        else:
            *parts, labels = self._pair(start, span, target, keys)
            a, a_length, b, b_length = (part[:, None] for part in parts)
        b_start = 2 + a_length  # behind [CLS] A [SEP]
        lengths = b_start + b_length + 1
        in_b = columns >= b_start
        source = np.where(in_b, b + columns - b_start, a + columns - 1)
        ids = np.take(self.store.tokens, source, mode="clip").astype(np.int64)
        ids[:, 0] = special("cls")
        ids[(columns == b_start - 1) | (columns == lengths - 1)] = special("sep")
        ids[columns >= lengths] = special("pad")
        return ids, (in_b & (columns < lengths)).astype(np.int64), lengths[:, 0], labels

    def _pair(
        self, start: np.ndarray, span: np.ndarray, target: np.ndarray, keys: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """First token and length of segments A and B, and the label."""
        border = self._border(start, span, keys)
        labels = below(2, keys, _LABEL)
        a, a_length, b, b_length = start, border - start, border, start + span - border
        if self.sentence_task == "nsp":
            # The partner is no longer than what it replaces, or its length would give the label away.
            partner, partner_end = self._partner(start, keys)
            b = np.where(labels == 1, partner, b)
            b_length = np.where(labels == 1, np.minimum(b_length, partner_end - partner), b_length)
        # The longer segment is trimmed first, at a random one of its ends or both.
        half = -(-target // 2)
        a_kept = np.minimum(a_length, np.maximum(target - b_length, half))
        b_kept = np.minimum(b_length, target - a_kept)
        a = a + below(a_length - a_kept + 1, keys, _TRIM_A)
        b = b + below(b_length - b_kept + 1, keys, _TRIM_B)
        if self.sentence_task == "sop":
            swap = labels == 1
            a, b = np.where(swap, b, a), np.where(swap, a, b)
            a_kept, b_kept = np.where(swap, b_kept, a_kept), np.where(swap, a_kept, b_kept)
        return a, a_kept, b, b_kept, labels

    def _border(self, start: np.ndarray, span: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """A random sentence border inside each sample; in one that has none, a random word border."""
        first = np.searchsorted(self.store.sentences, start, side="right")
        count = np.searchsorted(self.store.sentences, start + span) - first
        border = self.store.sentences[np.minimum(first + below(np.maximum(count, 1), keys, _BORDER), first + count)]
        for row in np.flatnonzero(count == 0):
            inner = np.arange(start[row] + 1, start[row] + span[row])
            words = inner[self.tokenizer.word_start[self.store.tokens[inner]]]
            choices = words if len(words) else inner
            border[row] = choices[below(len(choices), keys[row : row + 1], _BORDER)[0]]
        return border

    def _partner(self, start: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A random sentence of another document, as its first token, and where that document ends."""
        documents, sentences = self.store.documents, self.store.sentences
        own = np.searchsorted(documents, start, side="right") - 1
        own_first, own_end = np.searchsorted(sentences, documents[own]), np.searchsorted(sentences, documents[own + 1])
        drawn = below(len(sentences) - 1 - (own_end - own_first), keys, _PARTNER)
        partner = sentences[np.where(drawn < own_first, drawn, drawn + own_end - own_first)]
        return partner, documents[np.searchsorted(documents, partner, side="right")]


def open_samples(store: TokenStore, task: DataTask) -> BertSamples | PackedSamples:
    """See `SampleRules`."""
    data, sentence_task, size = task.data, task.objective.sentence_task, task.data.max_seq_length
    kind = "single" if sentence_task == "none" else "pairs"
    folder = task.cache / "samples" / f"{store.digest}-{TABLE_VERSION}-{kind}-{size}-{data.short_seq_prob!r}"
    table = open_table(store, size, data.short_seq_prob, sentence_task, folder, task.report)
    if data.packing == "none":
        return BertSamples(store, table, size, sentence_task, task.tokenizer)
    folder = folder.with_name(f"{folder.name}-{data.packing}-{PACKING_VERSION}")
    packed = open_packed(folder, table.starts, table.spans, size, store.name, task.report)
    return PackedSamples(store, packed, task.tokenizer)


def sample_settings(data: DataConfig, objective: ObjectiveConfig) -> list[Any]:
    """See `SampleRules`."""
    chosen = [objective.mlm_probability, objective.masking, objective.sentence_task]
    packing = [] if data.packing == "none" else [data.packing, PACKING_VERSION]
    return [data.max_seq_length, data.short_seq_prob, *chosen, _max_predictions(data, objective), *packing]


def _max_predictions(data: DataConfig, objective: ObjectiveConfig) -> int:
    given = objective.max_predictions_per_seq
    return given if given is not None else math.ceil(objective.mlm_probability * data.max_seq_length)


def collate(task: DataTask) -> Collate:
    """Return what masks rows and makes a batch of them; see `SampleRules`.

    Of a batch: input_ids, token_type_ids (B, S) int64; attention_mask (B, S) bool, True = a token; masked_positions (M,)
    int64, flat indices into B * S, ascending; masked_labels (M,) int64; for nsp and sop sentence_labels (B,) int64, 1 =
    random partner or swapped order; for unpad token_positions (T,) int64, where attention_mask is True, as flat indices,
    ascending, with the first of every row. Of packed rows also position_ids (B, S) int64, from 0 in each sample; segment_ids
    (B, S) int32, samples counted from 0 in each row, padding being one more.
    """
    tokenizer, objective = task.tokenizer, task.objective
    is_special = np.zeros(tokenizer.vocab_size, dtype=bool)
    is_special[tokenizer.special_ids] = True
    word_start, word_end = tokenizer.word_borders
    rule = MaskingRule(
        unit=objective.masking,
        probability=objective.mlm_probability,
        max_predictions=_max_predictions(task.data, objective),
        mask_id=tokenizer.special_id("mask"),
        is_special=is_special,
        word_start=word_start,
        plain_ids=np.flatnonzero(~is_special),
        word_end=word_end,
    )

    if task.data.packing != "none":
        return partial(packed_batch, rule=rule)

    def batch_of(rows: Rows, keys: np.ndarray) -> dict[str, np.ndarray]:
        ids, token_types, lengths, labels = rows
        masked = mask_rows(ids, lengths, keys, rule)
        batch = {
            "input_ids": masked.input_ids,
            "token_type_ids": token_types,
            "attention_mask": np.arange(ids.shape[1]) < lengths[:, None],
            "masked_positions": masked.positions,
            "masked_labels": masked.labels,
        }
        if objective.sentence_task != "none":
            batch["sentence_labels"] = labels
        if task.unpad:  # found here, because finding them on a GPU would make the host wait
            batch["token_positions"] = np.flatnonzero(batch["attention_mask"])
        return batch

    return batch_of
