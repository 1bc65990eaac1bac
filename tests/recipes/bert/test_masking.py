import dataclasses

import numpy as np
import pytest

from xformer_train.recipes.bert.masking import MaskingRule, mask_rows
from xformer_train.recipes.data.counter_rng import hash64

V, MASK, SPECIAL = 500, 4, 5
IS_SPECIAL = np.arange(V) < SPECIAL
WORD_START = (np.arange(V) % 3 != 0) | IS_SPECIAL  # a third of the tokens continue a word
UNITS = ["subword", "whole_word", "span"]


def rule(unit="subword", probability=0.15, most=10**6):
    return MaskingRule(unit, probability, most, MASK, IS_SPECIAL, WORD_START, np.flatnonzero(~IS_SPECIAL))


def rows(B, S, lengths=None, seed=0):
    """[CLS] tokens [SEP] tokens [SEP] and padding."""
    ids = np.random.default_rng(seed).integers(SPECIAL, V, (B, S))
    lengths = np.full(B, S) if lengths is None else np.asarray(lengths)
    for row, length in enumerate(lengths):
        ids[row, length:] = 0
        ids[row, [0, length // 2, length - 1]] = 2, 3, 3
    return ids, lengths


def words(ids, length):
    """Column ranges of the words of one row."""
    found = []
    for column in range(length):
        if IS_SPECIAL[ids[column]]:
            continue
        if WORD_START[ids[column]] or IS_SPECIAL[ids[column - 1]]:
            found.append([])
        found[-1].append(column)
    return found


def by_row(masked, B, S):
    return [masked.positions[masked.positions // S == row] % S for row in range(B)]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("S", [4, 9, 63, 128])
def test_positions_are_ascending_labels_are_the_originals_and_the_rest_is_untouched(unit, S):
    ids, lengths = rows(17, S, np.random.default_rng(S).integers(4, S + 1, 17))
    before = ids.copy()
    masked = mask_rows(ids, lengths, hash64(np.arange(17)), rule(unit))
    assert np.array_equal(ids, before)
    assert (np.diff(masked.positions) > 0).all()
    assert np.array_equal(masked.labels, ids.ravel()[masked.positions])
    rest = np.delete(np.arange(17 * S), masked.positions)
    assert np.array_equal(masked.input_ids.ravel()[rest], ids.ravel()[rest])
    assert not IS_SPECIAL[masked.labels].any()
    assert ((masked.positions % S) < lengths[masked.positions // S]).all()


@pytest.mark.parametrize("unit", UNITS)
def test_a_row_does_not_depend_on_the_others(unit):
    ids, lengths = rows(8, 40)
    keys = hash64(3, np.arange(8))
    together = mask_rows(ids, lengths, keys, rule(unit))
    for row in range(8):
        one = slice(row, row + 1)
        alone = mask_rows(ids[one], lengths[one], keys[one], rule(unit))
        assert np.array_equal(alone.input_ids[0], together.input_ids[row])
        assert np.array_equal(alone.positions, by_row(together, 8, 40)[row])


@pytest.mark.parametrize(
    "length,most,expected", [(4, 99, 1), (10, 99, 2), (30, 99, 4), (128, 99, 19), (128, 7, 7), (5, 1, 1)]
)
def test_subwords_are_counted_as_in_bert(length, most, expected):
    ids, lengths = rows(5, 128, [length] * 5)
    masked = mask_rows(ids, lengths, hash64(np.arange(5)), rule(most=most))
    assert [len(columns) for columns in by_row(masked, 5, 128)] == [expected] * 5


def test_more_than_there_is_to_mask_masks_everything_but_special_tokens():
    ids, lengths = rows(3, 20)
    masked = mask_rows(ids, lengths, hash64(np.arange(3)), rule(probability=0.99))
    assert [len(columns) for columns in by_row(masked, 3, 20)] == [17] * 3


@pytest.mark.parametrize("unit", ["whole_word", "span"])
def test_words_are_masked_whole_and_within_the_budget(unit):
    ids, lengths = rows(200, 64)
    masked = mask_rows(ids, lengths, hash64(np.arange(200)), rule(unit, most=9))
    counts = []
    for row, columns in enumerate(by_row(masked, 200, 64)):
        chosen = set(columns.tolist())
        counts.append(len(chosen))
        free = []
        for word in words(ids[row], 64):
            assert chosen.issuperset(word) or chosen.isdisjoint(word)
            if chosen.isdisjoint(word):
                free.append(len(word))
        assert len(chosen) <= 9
        assert len(chosen) == 9 or min(free) > 9 - len(chosen)  # nothing that still fits is left out
    assert np.mean(counts) > 8.9


def test_a_row_whose_only_word_is_too_long_gets_no_prediction():
    ids = np.array([[2, 5 + 1, 6, 6, 6, 3]])
    ids[0, 1:5] = 9, 12, 15, 18  # multiples of three continue a word
    masked = mask_rows(ids, np.array([6]), hash64(1), rule("whole_word"))
    assert len(masked.positions) == 0
    assert np.array_equal(masked.input_ids, ids)


@pytest.mark.parametrize("unit", UNITS)
def test_fates_are_80_10_10_and_random_tokens_are_plain_and_even(unit):
    B, S = 2000, 64
    ids, lengths = rows(B, S)
    masked = mask_rows(ids, lengths, hash64(8, np.arange(B)), rule(unit))
    after = masked.input_ids.ravel()[masked.positions]
    other = (after != MASK) & (after != masked.labels)
    shares = np.array([(after == MASK).mean(), other.mean(), (after == masked.labels).mean()])
    # One in (V - SPECIAL) random tokens is the original. A fate covers a whole span of up to 10 words (about 5 tokens on
    # average), which widens the error of the mean by less than 4.
    expected = np.array([0.8, 0.1 - 0.1 / (V - SPECIAL), 0.1 + 0.1 / (V - SPECIAL)])
    error = np.sqrt(expected * (1 - expected) / len(after)) * (4 if unit == "span" else 1)
    assert (np.abs(shares - expected) < 4 * error).all()
    assert not IS_SPECIAL[after[other]].any()
    counts = np.bincount(after[other] - SPECIAL, minlength=V - SPECIAL)
    degrees = V - SPECIAL - 1
    chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert chi_square < degrees + 4 * np.sqrt(2 * degrees)


def test_every_plain_token_of_a_row_is_masked_equally_often():
    B, S = 6000, 32
    ids, lengths = rows(1, S)
    masked = mask_rows(np.repeat(ids, B, 0), np.repeat(lengths, B), hash64(np.arange(B)), rule())
    counts = np.bincount(masked.positions % S, minlength=S)
    plain = ~IS_SPECIAL[ids[0]]
    assert (counts[~plain] == 0).all()
    p = 5 / plain.sum()  # round(0.15 * 32) of them
    assert (np.abs(counts[plain] - B * p) < 5 * np.sqrt(B * p * (1 - p))).all()


def test_spans_have_the_lengths_of_spanbert_and_do_not_cross_special_tokens():
    B, S = 3000, 200
    ids, lengths = rows(B, S)
    one_word_each = dataclasses.replace(rule("span", probability=0.05), word_start=np.ones(V, dtype=bool))
    masked = mask_rows(ids, lengths, hash64(np.arange(B)), one_word_each)
    runs = []
    for columns in by_row(masked, B, S):
        runs += [len(run) for run in np.split(columns, np.flatnonzero(np.diff(columns) != 1) + 1)]
    # Ten tokens a row: spans of mean 3.8, of which the last is cut short by the budget; neighbours may touch.
    assert 2.5 < np.mean(runs) < 3.8
    assert max(runs) <= 10
    first_share = np.mean(np.array(runs) == 1)
    assert 0.2 < first_share < 0.4
    for columns in by_row(masked, B, S):
        assert not set(columns.tolist()) & {0, 100, 199}


def test_one_span_has_one_fate():
    ids, lengths = rows(300, 128)
    masked = mask_rows(ids, lengths, hash64(np.arange(300)), rule("span", most=6))
    after = masked.input_ids.ravel()[masked.positions] == MASK
    same_row = np.diff(masked.positions // 128) == 0
    adjacent = (np.diff(masked.positions) == 1) & same_row
    changes = after[1:][adjacent] != after[:-1][adjacent]
    assert changes.mean() < 0.1  # independent fates would change in 2 * 0.8 * 0.2 = 0.32 of the cases
