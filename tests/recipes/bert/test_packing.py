"""Rows of whole samples: what shares a row, what rows hold, how they are masked, and what a model makes of them."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers.prepared_data import equal, rows, write_text

from xformer_train.recipes import RECIPES
from xformer_train.recipes.bert import packing
from xformer_train.recipes.bert.masking import mask_rows
from xformer_train.recipes.bert.packing import best_fit, shuffled_numbers
from xformer_train.recipes.config import LayerFlags, ModelConfig, ObjectiveConfig
from xformer_train.recipes.data.counter_rng import hash64

ALONE = ObjectiveConfig(sentence_task="none")
RNG = np.random.default_rng(0)
MODERN = {  # the first layer is global, the second one local
    "position_embedding": "rope",
    "norm": "rms_norm",
    "norm_bias": False,
    "gated_mlp": True,
    "num_key_value_heads": 1,
    "sliding_window": 4,
    "global_attn_every_n_layers": 2,
}
LENGTHS = {  # and the size of a row
    "articles": (np.where(RNG.random(20_000) < 0.6, 512, RNG.integers(3, 513, 20_000)), 512),
    "sentences": (np.clip(RNG.lognormal(3.3, 0.7, 20_000), 3, 128).astype(np.int64), 128),
    "of any length": (RNG.integers(1, 101, 999), 100),
    "of equal length, a third": (np.full(100, 33), 100),
    "of equal length, two thirds": (np.full(9, 67), 100),
    "as long as a row": (np.full(7, 100), 100),
    "one": (np.array([5]), 100),
    "one token": (np.array([1, 1, 1, 1, 1]), 2),
}


def by_row(lengths, size):
    order, starts = best_fit(lengths, size, shuffled_numbers(len(lengths)))
    assert starts[0] == 0 and starts[-1] == len(order) == len(lengths)
    return [order[a:b] for a, b in pairwise(starts)]


def one_by_one(lengths, size):
    """How far each row is filled, ascending, as best-fit decreasing is written down: sample after sample."""
    filled = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in filled if row + length <= size]
        if fitting:
            filled.remove(max(fitting))
        filled.append(max(fitting, default=0) + length)
    return sorted(filled)


@pytest.mark.parametrize("lengths,size", LENGTHS.values(), ids=LENGTHS)
def test_every_sample_is_in_one_row_and_every_row_holds_what_it_has_room_for(lengths, size):
    found = by_row(lengths, size)
    assert np.array_equal(np.sort(np.concatenate(found)), np.arange(len(lengths)))
    filled = np.array([lengths[row].sum() for row in found])
    assert filled.min() > 0 and filled.max() <= size


@pytest.mark.parametrize("name", ["articles", "sentences"])
def test_lengths_as_texts_have_them_fill_the_rows(name):
    lengths, size = LENGTHS[name]
    assert lengths.sum() / (len(by_row(lengths, size)) * size) > 0.99


@pytest.mark.parametrize("name", list(LENGTHS)[2:])
def test_placing_equal_lengths_together_fills_rows_as_placing_sample_after_sample(name):
    lengths, size = LENGTHS[name]
    assert sorted(lengths[row].sum() for row in by_row(lengths, size)) == one_by_one(lengths, size)


def test_samples_of_a_row_are_from_anywhere_in_the_text():
    lengths = np.tile([60, 40], 500)
    distances = [abs(int(a) - int(b)) for a, b in by_row(lengths, 100)]
    assert 250 < np.mean(distances) < 420  # of two random places in 1,000: 333


@pytest.mark.parametrize("name", ["articles", "of any length", "one"])
def test_an_order_for_more_samples_gives_the_same_rows(name):
    lengths, size = LENGTHS[name]
    for of_enough, of_more in zip(
        *(best_fit(lengths, size, shuffled_numbers(n)) for n in (len(lengths), 2**15)), strict=True
    ):
        assert np.array_equal(of_enough, of_more)


def test_a_sample_that_is_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="a sample of 101 tokens does not fit into a row of 100"):
        best_fit(np.array([3, 101]), 100, shuffled_numbers(2))


def unmasked(batch):
    ids = batch["input_ids"].clone()
    ids.view(-1)[batch["masked_positions"]] = batch["masked_labels"]
    return ids


def samples_of(batch):
    """The unmasked ids of each sample, row after row."""
    ids = unmasked(batch)
    for row, segments, real in zip(ids, batch["segment_ids"], batch["attention_mask"], strict=True):
        for number in range(int(segments[real].max()) + 1):
            yield row[segments == number].tolist()


def test_an_epoch_of_packed_rows_holds_the_samples_of_an_epoch_of_padded_ones(prepare):
    packed = prepare(ALONE, packing="best_fit", short_seq_prob=0.4)
    padded = prepare(ALONE, short_seq_prob=0.4).train
    batch = padded.batch(np.arange(padded.num_samples))
    expected = [row[real].tolist() for row, real in zip(unmasked(batch), batch["attention_mask"], strict=True)]
    found = list(samples_of(packed.train.batch(np.arange(packed.train.num_samples))))
    assert sorted(found) == sorted(expected)
    sizes = packed.sizes.packing
    assert (sizes.rows, sizes.samples, sizes.tokens) == (packed.train.num_samples, len(found), sum(map(len, found)))
    assert sizes.tokens / (sizes.rows * 32) > 0.97
    assert padded.num_samples > 1.05 * sizes.rows


def test_packed_batches_have_the_stated_shapes_and_form(prepare, tokenizers):
    B, S = 20, 32
    batch = prepare(ALONE, packing="best_fit", short_seq_prob=0.9).train.batch(np.arange(B))
    M = len(batch["masked_positions"])
    assert {name: (tuple(value.shape), value.dtype) for name, value in batch.items()} == {
        "input_ids": ((B, S), torch.int64),
        "token_type_ids": ((B, S), torch.int64),
        "attention_mask": ((B, S), torch.bool),
        "position_ids": ((B, S), torch.int64),
        "segment_ids": ((B, S), torch.int32),
        "masked_positions": ((M,), torch.int64),
        "masked_labels": ((M,), torch.int64),
    }
    assert (batch["masked_positions"].diff() > 0).all()
    cls, sep, pad = (tokenizers["bert"].special_id(name) for name in ("cls", "sep", "pad"))
    counts = []
    for ids, real, positions, segments in zip(
        unmasked(batch), *(batch[name] for name in ("attention_mask", "position_ids", "segment_ids")), strict=True
    ):
        filled, number = int(real.sum()), int(segments[real].max()) + 1
        counts.append(number)
        assert real[:filled].all() and (ids[filled:] == pad).all() and (segments[filled:] == number).all()
        assert (segments[:filled].diff() >= 0).all()
        for one in range(number):
            own = (segments == one).nonzero().flatten()
            assert ids[own[0]] == cls and ids[own[-1]] == sep and (ids[own[1:-1]] != sep).all()
            assert torch.equal(positions[own], torch.arange(len(own)))
    assert max(counts) > 1


@pytest.mark.parametrize("unit", ["subword", "whole_word", "span"])
@pytest.mark.parametrize("short", [20, 128])
def test_a_sample_is_masked_as_in_a_row_of_its_own(unit, short, prepare, monkeypatch):
    monkeypatch.setattr(packing, "_SHORT", short)
    size = 64
    objective = ObjectiveConfig(sentence_task="none", masking=unit, max_predictions_per_seq=4)
    stream = prepare(objective, packing="best_fit", max_seq_length=size, short_seq_prob=0.5).train
    keys = hash64(7, np.arange(9))
    ids, _, segments, filled = unpacked = stream.parts[0].rows(np.arange(9), keys)
    batch, rule = stream.collate(unpacked, keys), stream.collate.keywords["rule"]
    lengths = []
    for row in range(9):
        for number in range(segments[row, filled[row] - 1] + 1):
            columns = np.flatnonzero(segments[row] == number)
            lengths.append(len(columns))
            key = hash64(keys[row : row + 1], np.array([number]))
            alone = mask_rows(ids[row : row + 1, columns], np.array([len(columns)]), key, rule)
            assert np.array_equal(batch["input_ids"][row, columns], alone.input_ids[0])
            here = np.isin(batch["masked_positions"], row * size + columns)
            assert np.array_equal(batch["masked_positions"][here], row * size + columns[0] + alone.positions)
            assert np.array_equal(batch["masked_labels"][here], alone.labels)
            if unit == "subword":
                assert len(alone.labels) == np.clip(np.rint(0.15 * len(columns)), 1, 4)
    assert min(lengths) < 20 and max(lengths) == size


def test_a_packed_row_is_the_same_in_any_batch_and_any_process_and_each_epoch_has_another_order(prepare):
    stream = prepare(ALONE, packing="best_fit").train
    N = stream.num_samples
    positions = np.array([0, N - 1, N, N + 1, 3 * N + 5, 17, 10**12])
    again = prepare(ALONE, packing="best_fit").train  # as another process would open it
    for position, one in zip(positions, rows(stream.batch(positions), len(positions)), strict=True):
        assert equal(one, rows(again.batch(np.array([position])), 1)[0])
    step = rows(stream.batch(np.arange(12)), 12)
    for processes in (2, 3):
        parts = [one for block in np.split(np.arange(12), processes) for one in rows(stream.batch(block), len(block))]
        assert all(equal(first, second) for first, second in zip(step, parts, strict=True))
    orders = [stream.locate(np.arange(epoch * N, (epoch + 1) * N))[1] for epoch in range(2)]
    orders.append(prepare(ALONE, packing="best_fit", seed=2).train.locate(np.arange(N))[1])
    assert all(np.array_equal(np.sort(order), np.arange(N)) for order in orders)
    assert not any(np.array_equal(orders[a], orders[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_several_sources_and_the_validation_text_are_packed_each_by_itself(tmp_path, prepare):
    sources = [
        write_text(tmp_path / name, count, seed=count).model_copy(update={"weight": weight})
        for name, count, weight in (("a.txt", 30, 3.0), ("b.txt", 90, 1.0))
    ]
    data = prepare(ALONE, sources, packing="best_fit", validation=[write_text(tmp_path / "held.txt", 20, seed=9)])
    assert data.sizes.packing.rows == sum(len(part) for part in data.train.parts) == data.sizes.samples
    assert data.sizes.packing.samples == sum(len(part.table.starts) for part in data.train.parts)
    assert len(list(samples_of(data.train.batch(np.arange(40))))) > 40
    assert len(list(samples_of(data.validation.batch(np.arange(5))))) > 5


def test_packing_is_found_again_and_leaves_what_was_prepared_without_it(prepare):
    told = []
    padded = prepare(ALONE, report=told.append)
    packed = prepare(ALONE, packing="best_fit", report=told.append)
    new = [line for line in told if "rows" in line]
    assert len(new) == 1 and new[0].endswith(f"text.txt: {packed.sizes.packing}")
    told.clear()
    assert prepare(ALONE, packing="best_fit", report=told.append).fingerprint == packed.fingerprint
    assert prepare(ALONE, packing="none", report=told.append).fingerprint == padded.fingerprint != packed.fingerprint
    assert told == []
    assert padded.sizes.packing is None


def test_the_rows_of_a_large_table_are_packed_in_blocks(prepare, monkeypatch):
    whole = prepare(ALONE, packing="best_fit").train
    monkeypatch.setattr(packing, "_BLOCK", 50)
    monkeypatch.setattr("xformer_train.recipes.bert.samples.PACKING_VERSION", -1)
    blocks = prepare(ALONE, packing="best_fit").train
    assert len(whole.parts[0].table.starts) > 100
    found, expected = (sorted(samples_of(one.batch(np.arange(one.num_samples)))) for one in (blocks, whole))
    assert found == expected


def test_a_text_of_one_sample_is_one_row(tmp_path, prepare):
    (tmp_path / "one.txt").write_text("Amber birch.")
    source = write_text(tmp_path / "unused.txt").model_copy(update={"path": str(tmp_path / "one.txt")})
    data = prepare(ALONE, source, packing="best_fit")
    assert (data.sizes.packing.rows, data.sizes.packing.samples) == (1, 1)
    batch = data.train.batch(np.array([0, 1]))
    assert (batch["attention_mask"].sum(1) == data.sizes.packing.tokens).all()


@pytest.mark.parametrize("keys", [{"pre_layer_norm": False}, {}, MODERN], ids=["post-LN", "pre-LN", "modern"])
def test_the_loss_and_gradients_of_packed_rows_are_those_of_their_samples_alone(keys, prepare):
    stream = prepare(ALONE, packing="best_fit", short_seq_prob=0.9).train
    batch = stream.batch(np.arange(6))
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3}
    model = ModelConfig(**sizes, **keys)
    torch.manual_seed(0)
    bert = RECIPES["bert"].build_model(model, LayerFlags(), ALONE, 320).double()
    packed = bert(**batch)["mlm"]
    alone, flat = 0, torch.arange(6 * 32).view(6, 32)
    for ids, segments, places in zip(batch["input_ids"], batch["segment_ids"], flat, strict=True):
        for number in segments.unique():
            own = places[segments == number]
            here = torch.isin(batch["masked_positions"], own)
            if here.any():
                row = ids[segments == number][None]
                where, labels = batch["masked_positions"][here] - own[0], batch["masked_labels"][here]
                alone = alone + bert(row, torch.zeros_like(row), row >= 0, where, labels)["mlm"]
    torch.testing.assert_close(packed, alone)
    gradients = [torch.autograd.grad(loss, list(bert.parameters())) for loss in (packed, alone)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)
