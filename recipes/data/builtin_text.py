"""Built-in text: the English documentation that ships inside every Python interpreter, about 2 MB.

Nothing is imported or run: docstrings are read from the sources of the standard library.
"""

import ast
import functools
import inspect
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from ...kernels.errors import UserError

VERSION = 1  # raise it when the same interpreter would give other documents

_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3"}
_RULE = re.compile(r"[*=\-~^#+_ ]{3,}")
_BLANK_LINES = re.compile(r"\n[ \t]*\n")
_WORD = re.compile(r"[A-Za-z][a-z']*")
_MIN_WORDS = 5
_MIN_SHARE_OF_LETTERS = 0.75


def builtin_identity() -> str:
    """What the built-in documents depend on: this interpreter's version and build."""
    return f"builtin {VERSION} {sys.version}"


@functools.cache
def builtin_documents() -> tuple[str, ...]:
    """Return English documents, in an order that is always the same: pydoc's topics, then one document per library module.

    A document is a module's docstrings in the order of the source, paragraphs parted by blank lines, lines joined.
    Paragraphs of code and tables are left out, and so is every paragraph that an earlier document has. Raises ValueError if
    the interpreter has no library sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    modules = _source_files(root)
    if not modules:
        raise UserError(
            f"data.sources kind builtin: this Python has no library sources below {root}; use a Python that ships them, or a "
            f"source of your own"
        )
    seen: set[str] = set()
    documents = []
    topics = root / "pydoc_data" / "topics.py"
    texts = [[text] for text in _string_values(topics)] if topics.is_file() else []
    for text in [*texts, *(_docstrings(path) for path in modules if path != topics)]:
        document = "\n\n".join(_new_paragraphs(text, seen))
        if document:
            documents.append(document)
    return tuple(documents)


def _source_files(root: Path) -> list[Path]:
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
        found += [Path(folder, name) for name in sorted(files) if name.endswith(".py")]
    return found


def _string_values(path: Path) -> list[str]:
    """The strings of the dict literals of a module, in order."""
    tree = ast.parse(path.read_bytes())
    values = [value for node in ast.walk(tree) if isinstance(node, ast.Dict) for value in node.values]
    return [value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]


def _docstrings(path: Path) -> list[str]:
    source = path.read_bytes()
    if b'"""' not in source:
        return []
    found: list[str] = []
    _collect(ast.parse(source).body, found)
    return found


def _collect(body: list[ast.stmt], found: list[str]) -> None:
    """Append the docstring at the head of `body` and those of the classes and functions in it, at any depth."""
    first = body[0] if body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        found.append(inspect.cleandoc(first.value.value))
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            _collect(node.body, found)


def _new_paragraphs(texts: list[str], seen: set[str]) -> Iterator[str]:
    for text in texts:
        for block in _BLANK_LINES.split(text):
            lines = [line.strip() for line in block.splitlines()]
            paragraph = " ".join(line for line in lines if line and not _RULE.fullmatch(line))
            if paragraph not in seen and _is_prose(paragraph):
                seen.add(paragraph)
                yield paragraph


def _is_prose(paragraph: str) -> bool:
    words = _WORD.findall(paragraph)
    if len(words) < _MIN_WORDS or ">>>" in paragraph:
        return False
    letters = sum(map(len, words)) + paragraph.count(" ")
    return letters >= _MIN_SHARE_OF_LETTERS * len(paragraph)
