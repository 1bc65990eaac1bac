"""Reading of sources that says how far it is."""

import gzip
import io
import random

import pytest

from xformer_train.recipes.config import SourceConfig
from xformer_train.recipes.data import progress
from xformer_train.recipes.data.progress import with_progress
from xformer_train.recipes.data.sources import open_source

# Digits that hardly shrink: a compressed file must take several reads.
LINES = [f"document {random.Random(number).getrandbits(128)}" for number in range(20_000)]


def source_of(tmp_path, name, kind="text", documents="line"):
    text = "\n".join(LINES) if kind == "text" else "\n".join(f'{{"text": "{line}"}}' for line in LINES)
    content = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return open_source(SourceConfig(kind=kind, path=str(tmp_path / name), documents=documents), tmp_path / "cache")


@pytest.mark.parametrize("name,kind", [("a.txt", "text"), ("a.txt.gz", "text"), ("a.jsonl", "jsonl")])
def test_shares_of_a_source_grow_to_all_of_its_bytes_in_each_pass(tmp_path, monkeypatch, name, kind):
    monkeypatch.setattr(progress, "_REPORT_EVERY_S", -1.0)
    source = source_of(tmp_path, name, kind)
    for _ in range(2):
        told = []
        assert list(with_progress(source, "reading it", told.append, lambda: ", 7 tokens")) == LINES
        assert len(told) == len(LINES)
        assert (
            told[0].startswith("reading it: 1 documents (")
            and told[-1] == "reading it: 20,000 documents (100%), 7 tokens"
        )
        shares = [int(line.split("(")[1].split("%")[0]) for line in told]
        assert shares == sorted(shares) and len(set(shares)) > 2


def test_a_terminal_gets_a_bar_in_bytes_and_no_lines(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(progress, "_REPORT_EVERY_S", -1.0)
    monkeypatch.setattr("sys.stderr", Terminal())
    source, told = source_of(tmp_path, "a.txt"), []
    assert list(with_progress(source, "reading it", told.append)) == LINES
    assert not told
    assert "reading it:   0%|" in progress.sys.stderr.getvalue() and "B/s" in progress.sys.stderr.getvalue()


def test_a_source_of_unknown_length_tells_its_documents(monkeypatch, tmp_path):
    monkeypatch.setattr(progress, "_REPORT_EVERY_S", -1.0)
    told = []
    documents = list(with_progress(open_source(SourceConfig(kind="builtin"), tmp_path), "reading it", told.append))
    assert told[-1] == f"reading it: {len(documents):,} documents"
