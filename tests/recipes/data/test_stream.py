"""Prepared data of any objective: which sample comes when, from which source, and what is refused."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.prepared_data import CLM, each_objective, equal, rows, store_documents, write_text
from tokenizers import Tokenizer, decoders

from xformer_train.recipes import RECIPES
from xformer_train.recipes.config import DataConfig, ObjectiveConfig, SourceConfig, TokenizerConfig
from xformer_train.recipes.data.stream import draws_per_epoch, prepare_data
from xformer_train.recipes.data.tokenizer import train_tokenizer


@each_objective
def test_a_sample_is_the_same_in_any_order_any_batch_and_any_process(prepare, objective):
    stream = prepare(objective).train
    N = stream.num_samples
    positions = np.array([0, 1, N - 1, N, N + 1, 3 * N + 5, 17, 10**12])  # straddles epochs
    together = rows(stream.batch(positions), len(positions))
    shuffled = rows(stream.batch(positions[::-1].copy()), len(positions))[::-1]
    again = prepare(objective).train  # as another process would open it
    for position, first, second in zip(positions, together, shuffled, strict=True):
        assert equal(first, second)
        assert equal(first, rows(again.batch(np.array([position])), 1)[0])


@each_objective
def test_blocks_of_any_number_of_ranks_make_up_the_same_step(prepare, objective):
    stream = prepare(objective).train
    step = np.arange(7 * 12, 8 * 12)
    whole = rows(stream.batch(step), 12)
    for ranks in (2, 3, 4):
        parts = [one for block in np.split(step, ranks) for one in rows(stream.batch(block), len(block))]
        assert all(equal(first, second) for first, second in zip(whole, parts, strict=True))


@each_objective
def test_an_epoch_takes_every_sample_once_and_each_epoch_another_order(prepare, objective):
    stream = prepare(objective).train
    N = stream.num_samples
    orders = []
    for epoch in range(3):
        _, index = stream.locate(np.arange(epoch * N, (epoch + 1) * N))
        assert np.array_equal(np.sort(index), np.arange(N))
        orders.append(index)
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[1], orders[2])


def test_masks_differ_between_epochs_and_seeds(prepare):
    objective = ObjectiveConfig(sentence_task="none")
    data = prepare(objective, short_seq_prob=0.0)
    N = data.train.num_samples
    epochs = [data.train.locate(np.arange(N) + epoch * N)[1] for epoch in range(2)]
    same_sample = [int(np.flatnonzero(index == 3)[0]) + epoch * N for epoch, index in enumerate(epochs)]
    first, second = rows(data.train.batch(np.array(same_sample)), 2)
    assert torch.equal(first["attention_mask"], second["attention_mask"])
    assert not torch.equal(first["input_ids"], second["input_ids"])
    other = prepare(objective, seed=2, short_seq_prob=0.0)
    assert not equal(data.train.batch(np.arange(9)), other.train.batch(np.arange(9)))


@each_objective
def test_unpad_adds_the_places_of_the_tokens_and_changes_no_sample(prepare, objective):
    padded, unpadded = prepare(objective, short_seq_prob=0.5), prepare(objective, short_seq_prob=0.5, unpad=True)
    batch, same = padded.train.batch(np.arange(8)), unpadded.train.batch(np.arange(8))
    if objective.type == "mlm":  # GPT has no padding
        places = same.pop("token_positions")
        assert torch.equal(places, batch["attention_mask"].flatten().nonzero().flatten())
        assert places.dtype == torch.int64
        assert torch.isin(torch.arange(0, batch["input_ids"].numel(), batch["input_ids"].shape[1]), places).all()
        assert len(places) < batch["input_ids"].numel()
    assert equal(batch, same)
    assert padded.fingerprint == unpadded.fingerprint


def test_sources_without_weights_are_drawn_in_proportion_to_their_size(tmp_path, prepare):
    sources = [write_text(tmp_path / "a.txt", 30), write_text(tmp_path / "b.txt", 90, seed=5)]
    stream = prepare(CLM, sources).train
    sizes = [len(part) for part in stream.parts]
    assert stream.draws == sizes
    source, index = stream.locate(np.arange(stream.num_samples))
    for number, size in enumerate(sizes):
        assert np.array_equal(np.sort(index[source == number]), np.arange(size))
    batch = stream.batch(np.arange(stream.num_samples))
    tokens = np.concatenate([part.store.tokens[: len(part) * 32] for part in stream.parts])
    assert np.array_equal(np.sort(batch["input_ids"].numpy().ravel()), np.sort(tokens))


def test_weighted_sources_have_their_share_in_every_epoch_and_are_passed_through_evenly(tmp_path, prepare):
    sources = [
        write_text(tmp_path / name, count, seed=count).model_copy(update={"weight": weight})
        for name, count, weight in (("a.txt", 30, 3.0), ("b.txt", 90, 1.0))
    ]
    stream = prepare(CLM, sources).train
    sizes, N = [len(part) for part in stream.parts], stream.num_samples
    assert sum(sizes) == N
    assert abs(stream.draws[0] - 0.75 * N) < 1
    source, index = stream.locate(np.arange(4 * N))
    for epoch in range(4):
        assert np.bincount(source[epoch * N : (epoch + 1) * N]).tolist() == stream.draws
    for number, size in enumerate(sizes):
        times = np.bincount(index[source == number], minlength=size)
        assert times.max() - times.min() <= 1  # full passes, and one that is under way


@pytest.mark.parametrize("weights,sizes,expected", [((1, 1), (3, 2), [3, 2]), ((0.1, 0.2, 0.7), (10, 0, 0), [1, 2, 7])])
def test_draws_sum_to_the_samples_there_are(weights, sizes, expected):
    sources = [SourceConfig(kind="builtin", weight=float(weight)) for weight in weights]
    assert draws_per_epoch(list(sizes), sources) == expected


def test_validation_fraction_holds_out_documents_that_are_not_trained_on(prepare):
    data = prepare(ObjectiveConfig(sentence_task="none"), validation_fraction=0.3)
    assert data.validation is not None
    train, held_out = store_documents(data.train), store_documents(data.validation)
    assert len(train) + len(held_out) == 60
    assert 5 < len(held_out) < 31
    assert not {tuple(tokens) for tokens in train} & {tuple(tokens) for tokens in held_out}
    assert data.sizes.documents == len(train)
    assert data.sizes.tokens == sum(map(len, train))
    assert data.sizes.samples == data.train.num_samples


def test_validation_text_of_its_own_is_read_whole(tmp_path, prepare):
    other = write_text(tmp_path / "held.txt", 20, seed=9)
    data = prepare(CLM, validation=[other])
    assert len(store_documents(data.validation)) == 20
    assert len(store_documents(data.train)) == 60
    assert prepare(CLM).validation is None


def test_the_fingerprint_changes_with_everything_that_changes_the_samples(tmp_path, prepare, tokenizers):
    base = prepare().fingerprint
    assert prepare(validation=[write_text(tmp_path / "held.txt", 20, seed=9)]).fingerprint == base
    assert prepare(ObjectiveConfig(max_predictions_per_seq=5)).fingerprint == base  # what ceil(0.15 * 32) gives
    (tmp_path / "copy.txt").write_text((tmp_path / "text.txt").read_text())
    assert prepare(source=SourceConfig(kind="text", path=str(tmp_path / "copy.txt"))).fingerprint == base
    others = [
        prepare(seed=2),
        prepare(max_seq_length=33),
        prepare(short_seq_prob=0.2),
        prepare(validation_fraction=0.1),
        prepare(source=write_text(tmp_path / "more.txt", 61)),
        prepare(ObjectiveConfig(mlm_probability=0.2)),
        prepare(ObjectiveConfig(masking="span")),
        prepare(ObjectiveConfig(sentence_task="sop")),
        prepare(ObjectiveConfig(sentence_task="none")),
        prepare(ObjectiveConfig(max_predictions_per_seq=4)),
        prepare(CLM),
        prepare(CLM, seed=2),
    ]
    fingerprints = [other.fingerprint for other in others]
    assert len({base, *fingerprints}) == len(fingerprints) + 1
    assert prepare(CLM, short_seq_prob=0.7).fingerprint == prepare(CLM).fingerprint


@pytest.mark.parametrize(
    "text,objective,message",
    [
        ("", CLM, "there is no text in it"),
        (" \n\n \n", ObjectiveConfig(), "there is no text in it"),
        ("too short", CLM, r"holds \d+ tokens, fewer than one sample of data\.max_seq_length=32"),
        ("one\n\na", ObjectiveConfig(), None),
        (
            "One. Two. Three.",
            ObjectiveConfig(),
            "sentence_task=nsp takes partners from other documents, and .* is one document",
        ),
        ("a", ObjectiveConfig(sentence_task="sop"), "too little text for one sample"),
    ],
)
def test_too_little_text_is_one_clear_sentence(tmp_path, prepare, text, objective, message):
    (tmp_path / "s.txt").write_text(text)
    source = SourceConfig(kind="text", path=str(tmp_path / "s.txt"))
    if message is None:
        assert prepare(objective, source).train.num_samples >= 1
        return
    with pytest.raises(ValueError, match=message) as error:
        prepare(objective, source)
    assert "s.txt" in str(error.value)


@pytest.mark.parametrize("fraction,which", [(0.001, "none"), (0.999, "all")])
def test_a_validation_fraction_that_leaves_a_part_empty_is_refused(prepare, fraction, which):
    with pytest.raises(ValueError, match=f"validation_fraction={fraction} holds out {which} of the 60 documents"):
        prepare(CLM, validation_fraction=fraction)


def test_a_tokenizer_of_the_other_model_is_refused(tmp_path, tokenizers):
    data = DataConfig(sources=[write_text(tmp_path / "a.txt")], cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="a gpt needs eos"):
        prepare_data(RECIPES["gpt"], tokenizers["bert"], data, CLM, 1, lambda _: None)


@pytest.mark.parametrize("objective", [ObjectiveConfig(), CLM], ids=["bert", "gpt"])
def test_a_tokenizer_file_of_another_form_leaves_the_fingerprint_as_it_is(prepare, tokenizers, objective, monkeypatch):
    model_type = "bert" if objective.type == "mlm" else "gpt"
    before = prepare(objective).fingerprint
    other = Tokenizer.from_str(tokenizers[model_type].tokenizer.to_str())
    other.decoder = decoders.Fuse()  # no sample depends on it
    same_symbols = replace(tokenizers[model_type], tokenizer=other)
    assert same_symbols.fingerprint != tokenizers[model_type].fingerprint
    monkeypatch.setitem(tokenizers, model_type, same_symbols)
    assert prepare(objective).fingerprint == before


def test_samples_without_a_token_to_predict_are_refused_before_training(tmp_path, prepare):
    rng = np.random.default_rng(0)
    genome = ["".join(rng.choice(list("acgt"), 300)) for _ in range(20)]
    (tmp_path / "genome.txt").write_text("\n\n".join(genome))
    source = SourceConfig(kind="text", path=str(tmp_path / "genome.txt"))
    for masking in ("whole_word", "span"):
        objective = ObjectiveConfig(sentence_task="none", masking=masking)
        with pytest.raises(ValueError, match=rf"100% of the samples have no token to predict, .*masking={masking}"):
            prepare(objective, source)
    good = write_text(tmp_path / "good.txt")
    prepare(ObjectiveConfig(sentence_task="none", masking="span"), [good])
    with pytest.raises(ValueError, match="the validation data: 100% of the samples have no"):
        prepare(ObjectiveConfig(sentence_task="none", masking="span"), [good], validation=[source])


def test_word_borders_are_part_of_the_fingerprint_only_where_the_text_has_them(
    tmp_path, prepare, tokenizers, monkeypatch
):
    made = train_tokenizer("bytes", TokenizerConfig(), (), lambda _: None, specials=RECIPES["bert"].tokenizer.specials)
    monkeypatch.setitem(tokenizers, "bert", made)
    (tmp_path / "chinese.txt").write_text("\n\n".join([" a b c 你好 d e f" * 9] * 50))
    chinese = SourceConfig(kind="text", path=str(tmp_path / "chinese.txt"))
    for source, masking, expected in ((None, "span", True), (chinese, "span", False), (chinese, "subword", True)):
        objective = ObjectiveConfig(sentence_task="none", masking=masking)
        tokenizers["bert"] = replace(made)
        found = prepare(objective, source).fingerprint
        with monkeypatch.context() as patch:
            patch.setattr("xformer_train.recipes.data.words._UNSPACED", re.compile("(?!)"))
            tokenizers["bert"] = replace(made)
            assert (prepare(objective, source).fingerprint == found) == expected
