"""What BERT's samples hold: pairs, their labels, their lengths."""

import numpy as np
import torch
from helpers.prepared_data import OBJECTIVES, WORDS, store_documents, write_text

from xformer_train.recipes.bert.samples import BertSamples
from xformer_train.recipes.config import ObjectiveConfig, SourceConfig


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


def find(part, whole):
    return [at for at in range(len(whole) - len(part) + 1) if whole[at : at + len(part)] == part]


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


def test_large_tables_are_built_in_blocks_with_the_same_result(prepare, monkeypatch):
    whole = [prepare(objective).train.parts[0].table for objective in OBJECTIVES[1:3]]
    monkeypatch.setattr("xformer_train.recipes.bert.samples._BLOCK_SENTENCES", 7)
    monkeypatch.setattr("xformer_train.recipes.bert.samples.TABLE_VERSION", -1)
    for objective, expected in zip(OBJECTIVES[1:3], whole, strict=True):
        table = prepare(objective).train.parts[0].table
        for name in ("starts", "spans", "targets"):
            assert np.array_equal(getattr(table, name), getattr(expected, name))
