import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from xformer_train.recipes import data as data_module
from xformer_train.recipes import token_store
from xformer_train.recipes.bert_samples import BertSamples
from xformer_train.recipes.config import DataConfig, ObjectiveConfig, SourceConfig, TokenizerConfig
from xformer_train.recipes.data import draws_per_epoch, prepare_data
from xformer_train.recipes.token_store import split_sentences
from xformer_train.recipes.tokenizer import train_tokenizer

WORDS = ["amber", "birch", "cedar", "dune", "ember", "fjord", "grove", "heath", "islet", "jetty", "knoll", "lagoon"]
CLM = ObjectiveConfig(type="clm")


def document(number, rng):
    sentences = [" ".join(rng.choice(WORDS, rng.integers(3, 12))) for _ in range(rng.integers(1, 9))]
    return f"Number {number}. " + " ".join(f"{sentence.capitalize()}." for sentence in sentences)


def write_text(path, count=60, seed=0):
    rng = np.random.default_rng(seed)
    path.write_text("\n\n".join(document(number, rng) for number in range(count)))
    return SourceConfig(kind="text", path=str(path))


@pytest.fixture(scope="module")
def tokenizers():
    rng = np.random.default_rng(0)
    texts = [document(number, rng) for number in range(200)]
    config = TokenizerConfig(vocab_size=300)
    return {
        "bert": train_tokenizer("wordpiece", config, texts, lambda _: None, model_type="bert"),
        "gpt": train_tokenizer("bpe", config, texts, lambda _: None, model_type="gpt"),
    }


@pytest.fixture
def prepare(tmp_path, tokenizers):
    def run(objective=None, source=None, *, seed=1, report=lambda _: None, unpad=False, **keys):
        objective = objective or ObjectiveConfig()
        model_type = "bert" if objective.type == "mlm" else "gpt"
        sources = [source or write_text(tmp_path / "text.txt")] if not isinstance(source, list) else source
        settings = {"max_seq_length": 32, "cache_dir": str(tmp_path / "cache"), **keys}
        config = DataConfig(sources=sources, **settings)
        return prepare_data(model_type, tokenizers[model_type], config, objective, seed, report, unpad=unpad)

    return run


def rows(batch, B):
    """The tensors of each row; those that have no row dimension are cut up by the row they point into."""
    S = batch["input_ids"].shape[1]
    found = []
    for row in range(B):
        mine = {name: value[row] for name, value in batch.items() if not name.startswith("masked")}
        if "masked_positions" in batch:
            here = batch["masked_positions"] // S == row
            mine["masked_positions"] = batch["masked_positions"][here] % S
            mine["masked_labels"] = batch["masked_labels"][here]
        found.append(mine)
    return found


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


OBJECTIVES = [
    ObjectiveConfig(),
    ObjectiveConfig(sentence_task="sop", masking="whole_word"),
    ObjectiveConfig(sentence_task="none", masking="span"),
    CLM,
]
each_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda one: f"{one.type}-{one.sentence_task}")


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


def test_bert_batches_have_the_stated_shapes_and_form(prepare, tokenizers):
    tokenizer = tokenizers["bert"]
    stream = prepare(ObjectiveConfig(max_predictions_per_seq=3)).train
    B, S = 50, 32
    batch = stream.batch(np.arange(B))
    M = len(batch["masked_positions"])
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in batch.items()}
    assert shapes == {
        "input_ids": ((B, S), torch.int64),
        "token_type_ids": ((B, S), torch.int64),
        "attention_mask": ((B, S), torch.bool),
        "masked_positions": ((M,), torch.int64),
        "masked_labels": ((M,), torch.int64),
        "sentence_labels": ((B,), torch.int64),
    }
    ids = batch["input_ids"].clone()
    ids.view(-1)[batch["masked_positions"]] = batch["masked_labels"]
    cls, sep, pad = (tokenizer.special_id(name) for name in ("cls", "sep", "pad"))
    for row in range(B):
        length = int(batch["attention_mask"][row].sum())
        assert batch["attention_mask"][row, :length].all()
        assert ids[row, 0] == cls
        first_sep, second_sep = torch.nonzero(ids[row] == sep).flatten().tolist()
        assert second_sep == length - 1
        assert 1 < first_sep < second_sep - 1
        assert (ids[row, length:] == pad).all()
        expected = (torch.arange(S) > first_sep) & (torch.arange(S) < length)
        assert torch.equal(batch["token_type_ids"][row], expected.long())
        assert 1 <= int((batch["masked_positions"] // S == row).sum()) <= 3


def originals(stream, count, tokenizer):
    """Segments A and B of the first samples as text before masking, and the labels."""
    batch = stream.batch(np.arange(count))
    ids = batch["input_ids"].clone()
    ids.view(-1)[batch["masked_positions"]] = batch["masked_labels"]
    for row in range(count):
        types, length = batch["token_type_ids"][row], int(batch["attention_mask"][row].sum())
        border = int((types == 0).logical_and(torch.arange(len(types)) < length).sum())
        yield (
            ids[row, 1 : border - 1].tolist(),
            ids[row, border : length - 1].tolist(),
            int(batch["sentence_labels"][row]),
        )


def store_documents(stream):
    store = stream.parts[0].store
    return [store.tokens[a:b].tolist() for a, b in zip(store.documents[:-1], store.documents[1:], strict=True)]


def find(part, whole):
    return [at for at in range(len(whole) - len(part) + 1) if whole[at : at + len(part)] == part]


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


def test_nsp_pairs_are_neighbours_in_one_document_or_come_from_two(tmp_path, prepare, tokenizers):
    # Every word is in one document only, so that a segment tells where it is from.
    letters = "abcdefghijklmnopqrst"
    texts = [" ".join(f"{one}{one}{two}." for two in letters for _ in range(3)).title() for one in letters]
    (tmp_path / "own.txt").write_text("\n\n".join(texts))
    stream = prepare(source=SourceConfig(kind="text", path=str(tmp_path / "own.txt")), short_seq_prob=0.3).train
    documents = store_documents(stream)
    labels = []
    for a, b, label in originals(stream, 300, tokenizers["bert"]):
        homes = [[number for number, tokens in enumerate(documents) if find(part, tokens)] for part in (a, b)]
        if label == 0:
            common = set(homes[0]) & set(homes[1])
            assert any(
                at_b >= at_a + len(a)
                for n in common
                for at_a in find(a, documents[n])
                for at_b in find(b, documents[n])
            )
        elif len(homes[0]) == len(homes[1]) == 1:
            assert homes[0] != homes[1]
        labels.append(label)
    assert abs(np.mean(labels) - 0.5) < 4 * 0.5 / 300**0.5


def test_nsp_labels_do_not_show_in_the_lengths(prepare, tokenizers):
    stream = prepare(short_seq_prob=0.5).train
    by_label = {0: [], 1: []}
    for epoch in range(20):
        batch = stream.batch(np.arange(stream.num_samples) + epoch * stream.num_samples)
        for length, label in zip(
            batch["attention_mask"].sum(1).tolist(), batch["sentence_labels"].tolist(), strict=True
        ):
            by_label[label].append(length)
    real, random = (np.array(by_label[label]) for label in (0, 1))
    error = np.sqrt(real.var() / len(real) + random.var() / len(random))
    # A partner near the end of its document can be shorter than what it replaces, hence the allowance of two tokens.
    assert abs(real.mean() - random.mean()) < 4 * error + 2


def test_sop_pairs_are_neighbours_in_order_or_swapped(prepare, tokenizers):
    stream = prepare(ObjectiveConfig(sentence_task="sop")).train
    documents = store_documents(stream)
    seen = set()
    for a, b, label in originals(stream, 100, tokenizers["bert"]):
        first, second = (a, b) if label == 0 else (b, a)
        assert any(
            at_second >= at_first + len(first)
            for tokens in documents
            for at_first in find(first, tokens)
            for at_second in find(second, tokens)
        )
        seen.add(label)
    assert seen == {0, 1}


def test_one_epoch_of_single_segments_holds_every_token_once(prepare):
    stream = prepare(ObjectiveConfig(sentence_task="none"), short_seq_prob=0.4).train
    batch = stream.batch(np.arange(stream.num_samples))
    ids = batch["input_ids"].clone()
    ids.view(-1)[batch["masked_positions"]] = batch["masked_labels"]
    store = stream.parts[0].store
    lengths = batch["attention_mask"].sum(1)
    found = torch.cat([row[1 : length - 1] for row, length in zip(ids, lengths, strict=True)])
    assert np.array_equal(np.sort(found.numpy()), np.sort(store.tokens))
    assert "sentence_labels" not in batch
    assert not batch["token_type_ids"].any()


def test_pair_samples_stay_in_their_document_and_short_ones_have_their_share(tmp_path, prepare):
    source = write_text(tmp_path / "long.txt", count=400)
    part = prepare(source=source, short_seq_prob=0.3).train.parts[0]
    assert isinstance(part, BertSamples)
    table, store = part.table, part.store
    home = np.searchsorted(store.documents, table.starts, side="right")
    assert (table.starts + table.spans <= store.documents[home]).all()
    assert (table.starts[1:] >= (table.starts + table.spans)[:-1]).all()
    assert (table.spans >= 2).all()
    share = (table.targets < 29).mean()
    # Samples of full target leave less text behind, so the short ones are somewhat more than their share of starts.
    assert 0.2 < share < 0.45
    assert (prepare(source=source, short_seq_prob=0.0).train.parts[0].table.targets == 29).all()


def test_a_sentence_longer_than_a_row_is_cut_and_a_lone_sentence_is_divided_between_words(
    tmp_path, prepare, tokenizers
):
    (tmp_path / "run_on.txt").write_text(" ".join(WORDS * 30) + "\n\n" + "amber birch cedar\n\nknoll")
    stream = prepare(source=SourceConfig(kind="text", path=str(tmp_path / "run_on.txt")), short_seq_prob=0.0).train
    tokenizer = tokenizers["bert"]
    part = stream.parts[0]
    assert part.table.spans.max() <= 29
    covered = int(part.table.spans.sum())
    assert covered >= len(part.store.tokens) - len(tokenizer.encode_batch(["knoll"])[0]) - 1
    for epoch in range(3):
        batch = stream.batch(np.arange(stream.num_samples) + epoch * stream.num_samples)
        assert (batch["token_type_ids"].sum(1) >= 2).all()


def test_gpt_windows_join_documents_and_keep_their_borders(prepare, tokenizers):
    eos = tokenizers["gpt"].special_id("eos")
    stream = prepare(CLM).train
    tokens = stream.parts[0].store.tokens.astype(np.int64)
    S, N = 32, stream.num_samples
    assert len(tokens) // S == N
    batch = stream.batch(np.arange(N))
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in batch.items()}
    assert shapes == {
        "input_ids": ((N, S), torch.int64),
        "labels": ((N, S), torch.int64),
        "segment_ids": ((N, S), torch.int32),
        "position_ids": ((N, S), torch.int64),
    }
    _, index = stream.locate(np.arange(N))
    for row, window in enumerate(index):
        segment = position = 0
        for column in range(S):
            at = int(window) * S + column
            assert batch["input_ids"][row, column] == tokens[at]
            assert batch["segment_ids"][row, column] == segment
            assert batch["position_ids"][row, column] == position
            if tokens[at] == eos:
                assert batch["labels"][row, column] == -100
                segment, position = segment + 1, 0
            else:
                assert batch["labels"][row, column] == tokens[at + 1]
                position += 1


@pytest.mark.parametrize("end", ["eos at the last column", "no eos"])
def test_gpt_borders_at_the_edges_of_a_row(end):
    windows = np.array([[5, 9, 9, 9, 6]]) if end == "eos at the last column" else np.array([[1, 2, 3, 4, 5]])
    batch = data_module.with_document_borders(windows, 9)
    if end == "no eos":
        assert batch["labels"].tolist() == [[2, 3, 4, 5]]
        assert batch["segment_ids"].tolist() == [[0, 0, 0, 0]]
        assert batch["position_ids"].tolist() == [[0, 1, 2, 3]]
    else:
        assert batch["labels"].tolist() == [[9, -100, -100, -100]]
        assert batch["segment_ids"].tolist() == [[0, 0, 1, 2]]
        assert batch["position_ids"].tolist() == [[0, 1, 0, 0]]


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


def test_a_second_preparation_does_no_work(prepare, monkeypatch):
    told = []
    first = prepare(report=told.append)
    assert told
    told.clear()
    monkeypatch.setattr(token_store, "_encode", lambda *_: pytest.fail("tokenised again"))
    second = prepare(report=told.append)
    assert told == []
    assert second.fingerprint == first.fingerprint
    assert equal(dict(second.train.batch(np.arange(5))), dict(first.train.batch(np.arange(5))))


def test_large_tables_are_built_in_blocks_with_the_same_result(prepare, monkeypatch):
    whole = [prepare(objective).train.parts[0].table for objective in OBJECTIVES[1:3]]
    monkeypatch.setattr("xformer_train.recipes.bert_samples._BLOCK_SENTENCES", 7)
    monkeypatch.setattr("xformer_train.recipes.bert_samples.TABLE_VERSION", -1)
    for objective, expected in zip(OBJECTIVES[1:3], whole, strict=True):
        table = prepare(objective).train.parts[0].table
        for name in ("starts", "spans", "targets"):
            assert np.array_equal(getattr(table, name), getattr(expected, name))


def test_a_failure_half_way_leaves_nothing_and_the_next_try_works(tmp_path, prepare, monkeypatch):
    encode, calls = token_store._encode, []

    def fail_late(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(token_store, "_BATCH_DOCUMENTS", 10)
    monkeypatch.setattr(token_store, "_encode", fail_late)
    with pytest.raises(KeyboardInterrupt):
        prepare()
    assert [path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir()] == []
    assert len(store_documents(prepare().train)) == 60


_VICTIM = """
import os, signal, sys
from xformer_train.recipes import token_store
from xformer_train.recipes.config import DataConfig, ObjectiveConfig
from xformer_train.recipes.data import prepare_data
from xformer_train.recipes.tokenizer import load_tokenizer
encode, calls = token_store._encode, []
def kill_late(*arguments):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(*arguments)
token_store._BATCH_DOCUMENTS = 10
token_store._encode = kill_late
config = DataConfig.model_validate_json(sys.argv[2])
prepare_data("bert", load_tokenizer(sys.argv[1]), config, ObjectiveConfig(), 1, print)
"""


def test_a_process_killed_half_way_does_no_harm(tmp_path, prepare, tokenizers):
    tokenizers["bert"].save(tmp_path / "tokenizer")
    source = write_text(tmp_path / "text.txt")
    config = DataConfig(sources=[source], max_seq_length=32, cache_dir=str(tmp_path / "cache"))
    command = [sys.executable, "-c", _VICTIM, str(tmp_path / "tokenizer"), config.model_dump_json()]
    killed = subprocess.run(command, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"}, cwd=tmp_path, check=False)
    assert killed.returncode == -signal.SIGKILL
    left = [path.name for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir()]
    assert len(left) == 1
    assert left[0].endswith(".partial")
    assert len(store_documents(prepare(source=source).train)) == 60
    assert not [path for path in (tmp_path / "cache" / "tokens").iterdir() if path.name.endswith(".partial")]


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest"])
@pytest.mark.parametrize("kind", ["tokens", "samples"])
def test_a_damaged_cache_is_noticed_and_the_file_is_named(tmp_path, prepare, kind, damage):
    prepare()
    (folder,) = [path for path in (tmp_path / "cache" / kind).iterdir() if path.is_dir()]
    file = folder / ("manifest.json" if damage == "manifest" else "train.tokens" if kind == "tokens" else "starts")
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError) as error:
        prepare()
    assert str(file) in str(error.value)
    assert f"remove {folder} to have it prepared again" in str(error.value)


def test_a_vocabulary_beyond_16_bits_is_stored_whole(tmp_path, prepare, tokenizers, monkeypatch):
    monkeypatch.setitem(tokenizers["gpt"].__dict__, "vocab_size", 70_000)
    assert prepare(CLM).train.parts[0].store.tokens.dtype == np.uint32


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
        prepare_data("gpt", tokenizers["bert"], data, CLM, 1, lambda _: None)


def test_no_space_for_prepared_data_names_the_folder(tmp_path, prepare, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_store._Writer, "add", full)
    with pytest.raises(ValueError, match=rf"data\.cache_dir={tmp_path / 'cache'}: no space left"):
        prepare()


@pytest.mark.parametrize(
    "text,sentences",
    [
        ("One is here. Two is there! Is it? Yes.", ["One is here.", " Two is there!", " Is it?", " Yes."]),
        ("It costs 3.5 euros, e.g. today. So it is.", ["It costs 3.5 euros, e.g. today.", " So it is."]),
        ("J. R. Tolkien wrote. Then slept.", ["J. R. Tolkien wrote.", " Then slept."]),
        ('He said "no." (She agreed.) 7 came.', ['He said "no."', " (She agreed.)", " 7 came."]),
        ("Hard-wrapped line\ngoes on.\nNext one", ["Hard-wrapped line\ngoes on.", "\nNext one"]),
        ("Heading\n\nBody text", ["Heading\n\n", "Body text"]),
        ("今日は。明日！", ["今日は。", "明日！"]),
        ("он т.д. и всё. Да.", ["он т.д. и всё.", " Да."]),
        ("", []),
    ],
)
def test_sentences(text, sentences):
    assert list(split_sentences(text)) == sentences
    assert "".join(sentences) == text


def test_a_very_long_text_is_tokenised_in_pieces_cut_at_white_space(tmp_path, prepare, tokenizers, monkeypatch):
    rng = np.random.default_rng(0)
    text = " ".join(rng.choice(WORDS, 500))
    (tmp_path / "long.txt").write_text(text)
    source = SourceConfig(kind="text", path=str(tmp_path / "long.txt"))
    monkeypatch.setattr(token_store, "_LONGEST_TEXT", 100)
    tokens = prepare(CLM, source).train.parts[0].store.tokens
    expected = tokenizers["gpt"].encode_batch([text])[0]
    assert tokens[:-1].tolist() == expected.tolist()
    assert len(list(token_store._cut("x" * 250))) == 3


def test_the_manifest_says_what_the_folder_holds(tmp_path, prepare):
    prepare()
    (manifest,) = (tmp_path / "cache" / "tokens").glob("*/manifest.json")
    sizes = json.loads(Path(manifest).read_text())["bytes"]
    assert {f"{part}.{name}" for part in ("train", "held_out") for name in ("tokens", "documents", "sentences")} == set(
        sizes
    )
