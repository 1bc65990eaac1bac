"""Rows of several whole samples: which samples share a row, the rows, and their masks."""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from ..data.cache import open_or_build, read_array
from ..data.counter_rng import hash64
from ..data.run_tokenizer import RunTokenizer
from ..data.token_store import TokenStore
from ..recipe import Packing, Report, Rows
from .masking import MaskingRule, mask_rows

PACKING_VERSION = 1  # raise it when the same table would give other rows

_BLOCK = 2**20  # samples that are packed together, so that memory is bounded
_SPECIALS = 2  # [CLS] and [SEP]
_SHORT = 128  # tokens; an array with fewer columns is masked hardly faster


@dataclass(frozen=True)
class PackedTable:
    """Samples and their rows. starts: (N,) int64, first token of each; spans: (N,) uint32, its tokens without special ones;
    order: (N,) uint32 or int64, the samples row after row; row_starts: (R + 1,) int64, where each row starts there, then N."""

    starts: np.ndarray
    spans: np.ndarray
    order: np.ndarray
    row_starts: np.ndarray
    packing: Packing


def open_packed(
    folder: Path, starts: np.ndarray, spans: np.ndarray, size: int, name: str, report: Report
) -> PackedTable:
    """The rows of `size` tokens of these samples, packed now unless the folder is there. name: of the source."""
    dtype = "<u4" if len(starts) <= 2**32 else "<i8"

    def build(partial: Path) -> dict[str, Any]:
        num_rows = tokens = 0
        shuffled = shuffled_numbers(min(len(starts), _BLOCK))
        with (partial / "order").open("wb") as order_file, (partial / "row_starts").open("wb") as rows_file:
            for block in range(0, len(starts), _BLOCK):
                lengths = spans[block : block + _BLOCK].astype(np.int64) + _SPECIALS
                order, row_starts = best_fit(lengths, size, shuffled)
                order_file.write((block + order).astype(dtype).tobytes())
                rows_file.write((block + row_starts[:-1]).astype("<i8").tobytes())
                num_rows, tokens = num_rows + len(row_starts) - 1, tokens + int(lengths.sum())
            rows_file.write(np.array([len(starts)], dtype="<i8").tobytes())
        packing = Packing(num_rows, len(starts), tokens, size)
        report(f"{name}: {packing}")
        return asdict(packing)

    packing = Packing(**open_or_build(folder, build, report))
    order, row_starts = read_array(folder / "order", dtype), read_array(folder / "row_starts", "<i8")
    return PackedTable(starts, spans, order, row_starts, packing)


def best_fit(lengths: np.ndarray, size: int, shuffled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the samples row after row, (N,) int64, and where each row starts among them, (R + 1,) int64 with N at the end.

    lengths: (N,) integers of 1 to size. Longest samples first, each goes to the row with the least space left that still holds
    it (best-fit decreasing; Johnson, Near-Optimal Bin Packing Algorithms, 1973). shuffled: `shuffled_numbers` of N or more, the
    order of samples of equal length. Raises ValueError for a sample longer than a row.
    """
    if lengths.max(initial=0) > size:
        raise ValueError(f"a sample of {lengths.max()} tokens does not fit into a row of {size}; cut it")
    if len(shuffled) > len(lengths):
        shuffled = shuffled[shuffled < len(lengths)]
    missing = (size - lengths).astype(np.min_scalar_type(size))
    longest_first = shuffled[np.argsort(missing[shuffled], kind="stable")]
    runs = _runs(np.bincount(lengths, minlength=size + 1))
    first, rows, each, filled = np.fromiter(runs, dtype=(np.int64, 4)).T
    run, down = _enumerated(rows)
    row, taken = first[run] + down, each[run]
    starts = np.append(0, np.cumsum(np.bincount(row, taken).astype(np.int64)))
    begins = starts[row] + filled[run]
    order = np.empty(len(lengths), dtype=np.int64)
    order[np.repeat(begins - (np.cumsum(taken) - taken), taken) + np.arange(len(lengths))] = longest_first
    return order, starts


def shuffled_numbers(count: int) -> np.ndarray:
    """Return the numbers below count in a fixed random order, (count,) int64, so that samples of a row are from anywhere.

    Without its larger numbers it is the order of fewer, so that one serves all blocks.
    """
    return np.argsort(hash64(np.arange(count)).astype(np.uint16), kind="stable")  # sorts of 16 bits are the fastest


def _runs(counts: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
    """Yield (first row, rows, samples into each row, samples there before), for samples from long to short.

    counts: how many samples have each length, (size + 1,). Samples of one length are placed together, and rows with equal
    contents are a run of numbers, so that the work grows with the lengths and not with the samples.
    """
    size, num_rows = len(counts) - 1, 0
    spaces: list[int] = []  # ascending, those that some rows have left
    open_rows: list[list[tuple[int, int, int]]] = [[] for _ in counts]  # by space left: first row, rows, samples there

    def leave(space: int, run: tuple[int, int, int]) -> None:
        if not open_rows[space]:
            insort(spaces, space)
        open_rows[space].append(run)

    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            place = bisect_left(spaces, length)
            if place == len(spaces):
                space, first, rows, filled = size, num_rows, -(-left // (size // length)), 0
                num_rows += rows
            else:
                space = spaces[place]
                first, rows, filled = open_rows[space].pop()
                if not open_rows[space]:
                    del spaces[place]
            each = min(space // length, left)
            taken = min(rows, left // each)
            yield first, taken, each, filled
            left -= taken * each
            if taken < rows:
                leave(space, (first + taken, rows - taken, filled))
            if space > each * length:
                leave(space - each * length, (first, taken, filled + each))


@dataclass(frozen=True)
class PackedSamples:
    """Rows of one source, each of several samples `[CLS] text [SEP]`, one behind the other, and padding."""

    store: TokenStore
    table: PackedTable
    tokenizer: RunTokenizer

    def __len__(self) -> int:
        return self.packing.rows

    @property
    def packing(self) -> Packing:
        """What the rows hold."""
        return self.table.packing

    def rows(self, index: np.ndarray, keys: np.ndarray) -> Rows:
        """Unmasked rows: input_ids (B, S) int64; position_ids (B, S) int64, from 0 in each sample and in padding; segment_ids
        (B, S) int32, the number of each token's sample in its row, padding being one more; lengths (B,), tokens before padding.

        index: (B,) in [0, len). keys: nothing is random but the masks.
        """
        B, S, special = len(index), self.packing.size, self.tokenizer.special_id
        first = self.table.row_starts[index]
        counts = self.table.row_starts[index + 1] - first
        row, slot = _enumerated(counts + 1)  # the last of each row is its padding
        is_padding = slot == counts[row]
        sample = np.take(self.table.order, first[row] + slot, mode="clip")
        lengths = np.where(is_padding, 0, self.table.spans[sample].astype(np.int64) + _SPECIALS)
        filled = np.bincount(row, lengths, B).astype(np.int64)
        lengths[is_padding] = S - filled
        ends = np.cumsum(lengths)
        begins = ends - lengths
        places = np.arange(B * S)
        source = places + np.repeat(self.table.starts[sample] - 1 - begins, lengths)
        ids = np.take(self.store.tokens, source, mode="clip").astype(np.int64)
        ids[begins[~is_padding]], ids[ends[~is_padding] - 1] = special("cls"), special("sep")
        ids[np.repeat(is_padding, lengths)] = special("pad")
        position_ids = places - np.repeat(begins, lengths)
        segment_ids = np.repeat(slot.astype(np.int32), lengths)
        return ids.reshape(B, S), position_ids.reshape(B, S), segment_ids.reshape(B, S), filled


def packed_batch(rows: Rows, keys: np.ndarray, rule: MaskingRule) -> dict[str, np.ndarray]:
    """Return the batch of the rows of `PackedSamples`; `samples.collate` says what is in it.

    Each sample is masked as in a row of its own, by a key that follows from its row's and its number in the row.
    """
    ids, position_ids, segment_ids, filled = rows
    S = ids.shape[1]
    real = np.arange(S) < filled[:, None]
    places = np.flatnonzero(real & (position_ids == 0))
    row = places // S
    lengths = np.minimum(np.append(places[1:], ids.size), row * S + filled[row]) - places
    input_ids, positions = _masked(ids, places, lengths, hash64(keys[row], segment_ids.ravel()[places]), rule)
    return {
        "input_ids": input_ids,
        "token_type_ids": np.zeros_like(ids),
        "attention_mask": real,
        "position_ids": position_ids,
        "segment_ids": segment_ids,
        "masked_positions": positions,
        "masked_labels": ids.ravel()[positions],
    }


def _masked(
    ids: np.ndarray, places: np.ndarray, lengths: np.ndarray, keys: np.ndarray, rule: MaskingRule
) -> tuple[np.ndarray, np.ndarray]:
    """Return ids (B, S) with tokens replaced, and the chosen flat positions, ascending, for samples of these places and keys.

    A sample costs what the columns of its array do, hence another one for short samples.
    """
    S, chosen = ids.shape[1], np.zeros(ids.size, dtype=bool)
    replaced = np.append(ids, np.zeros(S, dtype=ids.dtype))  # longer, for the columns behind the last sample
    is_short = lengths <= _SHORT
    for here, width in ((is_short, min(_SHORT, S)), (~is_short, S)):
        if not here.any():
            continue
        masked = mask_rows(sliding_window_view(replaced, width)[places[here]], lengths[here], keys[here], rule)
        sample, column = np.divmod(masked.positions, width)
        positions = places[here][sample] + column
        chosen[positions] = True
        replaced[positions] = masked.input_ids.ravel()[masked.positions]
    return replaced[: ids.size].reshape(ids.shape), np.flatnonzero(chosen)


def _enumerated(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each of counts.sum() things, whose it is and which of its owner's, both (sum,) int64 from 0."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner]
