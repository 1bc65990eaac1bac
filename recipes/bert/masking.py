"""Masked-token objective: which tokens to predict, and what the model sees in their place.

Pure functions of the token rows and of one key per row; no state and no loop over rows.
"""

from dataclasses import dataclass

import numpy as np

from ..config import Masking
from ..data.counter_rng import below, hash64, uniform

SPAN_STOP = 0.2  # SpanBERT: lengths in words are geometric with this p, and at most ten (arXiv 1907.10529, section 3.1)
LONGEST_SPAN = 10
_SPAN_LENGTH_CDF = np.cumsum((1 - SPAN_STOP) ** np.arange(LONGEST_SPAN))
_SPAN_LENGTH_CDF /= _SPAN_LENGTH_CDF[-1]
_CHOICE, _FATE, _REPLACEMENT = range(3)


@dataclass(frozen=True)
class MaskingRule:
    """How tokens are chosen and replaced.

    unit: subword, each token by itself; whole_word, all tokens of a word or none; span, runs of whole words.
    probability: share of a row's tokens, special ones counted, to predict; at least one, at most max_predictions.
    is_special, word_start, word_end: (V,) bool, the last one None where no token ends a word by itself; plain_ids: (P,) int64,
        the tokens that may replace another one.
    """

    unit: Masking
    probability: float
    max_predictions: int
    mask_id: int
    is_special: np.ndarray
    word_start: np.ndarray
    plain_ids: np.ndarray
    word_end: np.ndarray | None = None


@dataclass(frozen=True)
class MaskedRows:
    """input_ids: (B, S) int64; positions: (M,) int64, flat indices into B * S, ascending; labels: (M,) int64."""

    input_ids: np.ndarray
    positions: np.ndarray
    labels: np.ndarray


def mask_rows(rows: np.ndarray, lengths: np.ndarray, keys: np.ndarray, rule: MaskingRule) -> MaskedRows:
    """The rows with chosen tokens replaced: 80 % by [MASK], 10 % by a random plain token, 10 % by themselves.

    rows: (B, S) int64, special tokens included; lengths: (B,) tokens before padding; keys: (B,) uint64, one per row.
    Special tokens are never chosen. A word of several tokens that does not fit what is left of a row's budget is not
    chosen, so a row may have fewer predictions than asked for, and none if every word is too long. In unit span the fate is
    drawn for a whole span, as SpanBERT does, otherwise for each token (Devlin et al., arXiv 1810.04805, section 3.1).
    """
    B, S = rows.shape
    candidates = (np.arange(S) < lengths[:, None]) & ~rule.is_special[rows]  # (B, S)
    budget = np.clip(np.rint(rule.probability * lengths), 1, rule.max_predictions).astype(np.int64)
    starts = candidates
    if rule.unit != "subword":
        after_gap = np.ones_like(candidates)
        after_gap[:, 1:] = ~candidates[:, :-1]
        if rule.word_end is not None:
            after_gap[:, 1:] |= rule.word_end[rows[:, :-1]]
        starts = candidates & (rule.word_start[rows] | after_gap)
    word = np.cumsum(starts, axis=1) - 1  # (B, S), number of each candidate's word in its row
    flat_word = (word + np.arange(B)[:, None] * S)[candidates]
    sizes = np.bincount(flat_word, minlength=B * S).reshape(B, S)  # tokens of each word, 0 behind the last word

    if rule.unit == "span":
        segment = np.zeros(B * S, dtype=np.int64)
        segment[flat_word] = np.cumsum(~candidates, axis=1)[candidates]  # differs across a special token
        group = _choose_spans(sizes, segment.reshape(B, S), keys, budget)
    else:
        group = np.where(_choose_words(sizes, keys, budget), 0, -1)
    chosen = np.zeros((B, S), dtype=bool)
    chosen[candidates] = group.ravel()[flat_word] >= 0
    positions = np.flatnonzero(chosen)

    labels = rows.ravel()[positions]
    row, column = np.divmod(positions, S)
    fate_of = group[row, word[row, column]] if rule.unit == "span" else column
    fate = uniform(keys[row], _FATE, fate_of)
    random_ids = rule.plain_ids[below(len(rule.plain_ids), keys[row], _REPLACEMENT, column)]
    input_ids = rows.copy()
    input_ids.ravel()[positions] = np.where(fate < 0.8, rule.mask_id, np.where(fate < 0.9, random_ids, labels))
    return MaskedRows(input_ids, positions, labels)


def _choose_words(sizes: np.ndarray, keys: np.ndarray, budget: np.ndarray) -> np.ndarray:
    """Which words are chosen, (B, W) bool: going through them in random order, each that still fits the budget.

    sizes: (B, W) tokens of each word, 0 = no word; budget: (B,) tokens.
    """
    W = sizes.shape[1]
    columns = np.arange(W, dtype=np.uint64)
    low_bits = np.uint64((1 << (W - 1).bit_length()) - 1)
    order = hash64(keys[:, None], _CHOICE, columns) | low_bits
    order[sizes == 0] = ~np.uint64(0)
    # The column travels in the low bits: sorting values is several times faster than sorting indices.
    order = (np.sort((order & ~low_bits) | columns, axis=1) & low_bits).astype(np.int64)
    sizes = np.take_along_axis(sizes, order, axis=1)
    taken = np.zeros(sizes.shape, dtype=bool)
    left = budget.copy()
    while True:
        fitting = ~taken & (sizes > 0) & (sizes <= left[:, None])
        if not fitting.any():
            break
        # The run up to the first word that does not fit; that word is out for good, as `left` only falls.
        new = fitting & (np.cumsum(np.where(fitting, sizes, 0), axis=1) <= left[:, None])
        taken |= new
        left -= np.where(new, sizes, 0).sum(axis=1)
    chosen = np.zeros(sizes.shape, dtype=bool)
    np.put_along_axis(chosen, order, taken, axis=1)
    return chosen


def _choose_spans(sizes: np.ndarray, segment: np.ndarray, keys: np.ndarray, budget: np.ndarray) -> np.ndarray:
    """For each word the word at which its span begins, -1 if it is not chosen, (B, W) int64.

    A span begins at a random word that is free and fits the budget. It ends at its length, at a special token (segment
    changes there), or before the first word that no longer fits.
    """
    B, W = sizes.shape
    # Above the 0 of words that cannot begin a span.
    priority = hash64(keys[:, None], _CHOICE, np.arange(W)) | np.uint64(1)
    span = np.full((B, W), -1, dtype=np.int64)
    out_of_reach = budget.max() + 1
    cost = np.where(sizes > 0, sizes, out_of_reach)  # of the words that are free
    left = budget.copy()
    active = np.arange(B)
    while True:
        fitting = cost[active] <= left[active, None]
        going = fitting.any(axis=1)
        active, fitting = active[going], fitting[going]
        if not len(active):
            return span
        first = np.argmax(np.where(fitting, priority[active], np.uint64(0)), axis=1)[:, None]
        drawn = uniform(priority[active[:, None], first])
        length = 1 + np.searchsorted(_SPAN_LENGTH_CDF, drawn, side="right")
        ahead = first + np.arange(LONGEST_SPAN)
        words = np.minimum(ahead, W - 1)
        row = active[:, None]
        new = (ahead < np.minimum(first + length, W)) & (cost[row, words] < out_of_reach)
        new &= segment[row, words] == segment[row, first]
        spent = np.cumsum(np.where(new, sizes[row, words], 0), axis=1)
        new &= spent <= left[row]
        left[active] -= np.where(new, spent, 0).max(axis=1)
        index, _ = np.nonzero(new)
        chosen = active[index], words[new]
        span[chosen] = first[index, 0]
        cost[chosen] = out_of_reach
