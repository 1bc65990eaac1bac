"""Tokenised text on disk: sentences, pieces, a cache that is whole or noticed to be damaged."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.prepared_data import CLM, WORDS, equal, store_documents, write_text
from tokenizers import Tokenizer, models, pre_tokenizers

from xformer_train.recipes.config import DataConfig, SourceConfig
from xformer_train.recipes.data import token_store, tokenizer
from xformer_train.recipes.data.sources import open_source
from xformer_train.recipes.data.token_store import split_sentences, tokenise
from xformer_train.recipes.data.tokenizer import load_tokenizer


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


def test_a_failure_half_way_leaves_nothing_and_the_next_try_works(tmp_path, prepare, monkeypatch):
    encode, calls = token_store._encode, []

    def fail_late(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(token_store, "_BATCH_TEXTS", 10)
    monkeypatch.setattr(token_store, "_encode", fail_late)
    with pytest.raises(KeyboardInterrupt):
        prepare()
    assert [path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir()] == []
    assert len(store_documents(prepare().train)) == 60


_VICTIM = """
import os, signal, sys
from xformer_train.recipes import RECIPES
from xformer_train.recipes.config import DataConfig, ObjectiveConfig
from xformer_train.recipes.data import token_store
from xformer_train.recipes.data.stream import prepare_data
from xformer_train.recipes.data.tokenizer import load_tokenizer
encode, calls = token_store._encode, []
def kill_late(*arguments):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(*arguments)
token_store._BATCH_TEXTS = 10
token_store._encode = kill_late
config = DataConfig.model_validate_json(sys.argv[2])
prepare_data(RECIPES["bert"], load_tokenizer(sys.argv[1]), config, ObjectiveConfig(), 1, print)
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


def test_text_that_the_tokenizer_does_not_know_is_told(tmp_path, prepare):
    (tmp_path / "greek.txt").write_text("\n\n".join(["ένα δύο τρία. Amber birch cedar dune, ember fjord."] * 2))
    told = []
    prepare(source=SourceConfig(kind="text", path=str(tmp_path / "greek.txt")), report=told.append)
    (warning,) = [text for text in told if text.startswith("warning: ")]
    assert "% of the tokens of text" in warning
    told.clear()
    prepare(report=told.append)
    assert told
    assert not [text for text in told if text.startswith("warning: ")]


def test_a_vocabulary_beyond_16_bits_is_stored_whole(tmp_path, prepare, tokenizers, monkeypatch):
    monkeypatch.setitem(tokenizers["gpt"].__dict__, "vocab_size", 70_000)
    assert prepare(CLM).train.parts[0].store.tokens.dtype == np.uint32


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
        ("So... What?! (J.! J... A.) No", ["So...", " What?!", " (J.!", " J...", " A.) No"]),
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


def test_a_line_of_marks_takes_time_in_proportion_to_its_length():
    marks = "." * 50_000 + "!?" * 25_000  # milliseconds; in proportion to its square, minutes
    assert list(split_sentences(marks)) == [marks]


def test_a_very_long_text_is_tokenised_in_pieces_cut_at_white_space(tmp_path, prepare, tokenizers, monkeypatch):
    rng = np.random.default_rng(0)
    text = " ".join(rng.choice(WORDS, 500))
    (tmp_path / "long.txt").write_text(text)
    source = SourceConfig(kind="text", path=str(tmp_path / "long.txt"))
    monkeypatch.setattr(tokenizer, "_LONGEST_TEXT", 100)
    monkeypatch.setattr(token_store, "_BATCH_CHARACTERS", 300)
    encode, batches = tokenizer.RunTokenizer.encode_batch, []
    monkeypatch.setattr(
        tokenizer.RunTokenizer, "encode_batch", lambda self, texts: batches.append(texts) or encode(self, texts)
    )
    tokens = prepare(CLM, source).train.parts[0].store.tokens
    assert "".join(piece for batch in batches for piece in batch) == text
    assert max(len(piece) for batch in batches for piece in batch) <= 100
    assert max(sum(map(len, batch)) for batch in batches) < 400
    expected = encode(tokenizers["gpt"], [text])[0]
    assert tokens[:-1].tolist() == expected.tolist()
    assert [len(piece) for piece in tokenizer.pieces("x" * 250)] == [100, 100, 50]


def test_the_manifest_says_what_the_folder_holds(tmp_path, prepare):
    prepare()
    (manifest,) = (tmp_path / "cache" / "tokens").glob("*/manifest.json")
    sizes = json.loads(Path(manifest).read_text())["bytes"]
    assert {f"{part}.{name}" for part in ("train", "held_out") for name in ("tokens", "documents", "sentences")} == set(
        sizes
    )


def test_a_special_token_that_no_cut_keeps_out_of_the_text_is_refused(tmp_path):
    made = Tokenizer(models.WordLevel({"<unk>": 0, "¶": 1, "a": 2}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["¶"])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "¶"}')
    tokenizer = load_tokenizer(tmp_path)

    def stored(text):
        (tmp_path / "a.txt").write_text(text)
        source = open_source(SourceConfig(kind="text", path=str(tmp_path / "a.txt")), tmp_path / "cache")
        return tokenise(source, tokenizer, "stream", 0.0, tmp_path / "cache", lambda _: None)[0]

    assert stored("a b a\n\na").tokens.tolist() == [2, 0, 2, 1, 2, 1]
    with pytest.raises(ValueError, match="2 special tokens come out of its text"):
        stored("a ¶ a\n\na ¶")
