import sys

import pytest

from xformer_train.recipes.data import builtin_text as corpus
from xformer_train.recipes.data.builtin_text import builtin_documents


def test_builtin_documents_are_many_english_and_always_the_same():
    documents = list(builtin_documents())
    assert len(documents) > 200
    assert sum(map(len, documents)) > 1_000_000
    text = " ".join(documents).split()
    assert text.count("the") / len(text) > 0.03
    corpus.builtin_documents.cache_clear()
    assert list(builtin_documents()) == documents


def test_no_paragraph_comes_twice_so_that_held_out_text_is_unseen():
    paragraphs = [paragraph for document in builtin_documents() for paragraph in document.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs))


def test_docstrings_are_read_without_importing_the_module(tmp_path, monkeypatch):
    (tmp_path / "antigravity_like.py").write_text(
        'raise SystemExit\nclass A:\n    """A class that keeps\n    what it is given."""\n    def f(self):\n'
        '        """Return the thing that it was given before."""\n'
        'def g():\n    """\n    >>> this_is_code(and_it_is_left_out) of the corpus here\n    """\n'
    )
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    assert list(corpus.builtin_documents.__wrapped__()) == [
        "A class that keeps what it is given.\n\nReturn the thing that it was given before."
    ]
    assert "antigravity_like" not in sys.modules


def test_an_interpreter_without_sources_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="kind builtin: this Python has no library sources"):
        corpus.builtin_documents.__wrapped__()
