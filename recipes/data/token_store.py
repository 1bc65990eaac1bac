"""Tokenised documents on disk: written once, document by document, then mapped into memory."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...kernels.errors import UserError
from ..recipe import Layout, Report
from .cache import open_or_build, read_array
from .progress import with_progress
from .run_tokenizer import RunTokenizer
from .sources import Source, is_held_out
from .tokenizer import pieces

FORMAT_VERSION = 1  # raise it when the same documents would give other files

_BATCH_TEXTS = 1024
_BATCH_CHARACTERS = 2**22
_MANY_UNKNOWN = 0.05  # of the tokens; text that a tokenizer was made for has nearly none
# A run of marks is tried at its first one (behind an initial at its second) and never again: a page of dots takes no hour.
_SENTENCE_END = re.compile(
    r"""(?:(?<![.!?…])(?<!\b[A-Z]) | (?<=\b[A-Z][.!?…])) [.!?…]++ ["'”’)\]]*+ (?=\s+["'“‘(\[]*([^\s"'“‘(\[]))
    | [。！？]+[”’」』]* | \n[^\S\n]*\n""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class TokenStore:
    """The documents of one source as tokens.

    name: of the source; tokens: (T,) uint16 or uint32; documents: (D + 1,) int64, where each document starts, then T;
    sentences: (N + 1,) int64 alike, empty in layout stream; digest: equal for equal contents.
    """

    name: str
    tokens: np.ndarray
    documents: np.ndarray
    sentences: np.ndarray
    digest: str

    @property
    def num_documents(self) -> int:
        return len(self.documents) - 1


def tokenise(
    source: Source, tokenizer: RunTokenizer, layout: Layout, held_out: float, cache: Path, report: Report
) -> tuple[TokenStore, TokenStore]:
    """Return the training and the held-out documents of a source, tokenised now unless the cache has them.

    layout: `sentences` keeps where sentences start, `stream` puts the end-of-document token after each document.
    held_out: share of the documents to hold out. Raises UserError if the source holds no text, its text gives special tokens,
    or either part is empty though it should not be.
    """
    known = json.dumps([FORMAT_VERSION, source.identity, tokenizer.fingerprint, layout, held_out])
    folder = cache / "tokens" / hashlib.blake2b(known.encode(), digest_size=16).hexdigest()
    dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"

    def build(partial: Path) -> dict[str, Any]:
        report(f"tokenising {source.name}")
        with (
            _Writer(partial, "train", dtype, tokenizer) as train,
            _Writer(partial, "held_out", dtype, tokenizer) as rest,
        ):

            def so_far() -> str:
                return f", {train.num_tokens + rest.num_tokens:,} tokens"

            for batch in _batches(with_progress(source, f"tokenising {source.name}", report, so_far)):
                chosen = [is_held_out(text, held_out) for text in batch]
                encoded = _encode(batch, tokenizer, layout)
                for writer, wanted in ((train, False), (rest, True)):
                    writer.add([ids for ids, is_out in zip(encoded, chosen, strict=True) if is_out == wanted])
        _check_parts(source.name, train.num_documents, rest.num_documents, held_out)
        specials = train.num_special + rest.num_special
        if layout == "stream":
            specials -= train.num_documents + rest.num_documents
        if specials:
            raise UserError(
                f"data source {source.name}: {specials:,} special tokens come out of its text, where they would be taken for "
                f"masks or the ends of documents; remove them from the text, or take another tokenizer"
            )
        num_tokens = train.num_tokens + rest.num_tokens
        report(f"tokenised {source.name}: {num_tokens:,} tokens")
        share = (train.num_unknown + rest.num_unknown) / num_tokens
        if share >= _MANY_UNKNOWN:
            report(
                f"warning: {share:.0%} of the tokens of {source.name} are unknown to the tokenizer, so nothing is learnt from "
                f"them; take a tokenizer that knows this text (a WordPiece from a file knows no word above 100 characters)"
            )
        return {"digests": {"train": train.digest, "held_out": rest.digest}}

    digests = open_or_build(folder, build, report)["digests"]
    first, second = (
        TokenStore(
            source.name if part == "train" else f"{source.name} (held-out part)",
            read_array(folder / f"{part}.tokens", dtype),
            read_array(folder / f"{part}.documents", "<i8"),
            read_array(folder / f"{part}.sentences", "<i8"),
            digests[part],
        )
        for part in ("train", "held_out")
    )
    return first, second


def _check_parts(name: str, num_train: int, num_held_out: int, held_out: float) -> None:
    if num_train + num_held_out == 0:
        raise UserError(f"data source {name}: there is no text in it; add text or name another source")
    if held_out > 0 and 0 in (num_train, num_held_out):
        which = "none" if num_held_out == 0 else "all"
        out = f"holds out {which} of the {num_train + num_held_out:,} documents of {name}"
        remedy = "change it, or give held-out text as data.validation"
        raise UserError(f"data.validation_fraction={held_out} {out}; {remedy}")


class _Writer:
    """Append documents to the three files of one part, and count their unknown tokens and the other special ones."""

    def __init__(self, folder: Path, part: str, dtype: str, tokenizer: RunTokenizer) -> None:
        self._files = {name: (folder / f"{part}.{name}").open("wb") for name in ("tokens", "documents", "sentences")}
        self._dtype = dtype
        self._hash = hashlib.blake2b(dtype.encode(), digest_size=16)
        self._is_special, self._is_unknown = np.zeros((2, tokenizer.vocab_size), dtype=bool)
        self._is_special[tokenizer.special_ids] = True
        self._is_unknown[list(tokenizer.unknown_ids)] = True
        self._is_special &= ~self._is_unknown
        self.num_tokens = self.num_documents = self.num_unknown = self.num_special = 0

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        for name in ("documents", "sentences"):
            self._write(name, np.array([self.num_tokens], dtype="<i8"))
        for file in self._files.values():
            file.close()

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def add(self, documents: list[list[np.ndarray]]) -> None:
        """documents: the token ids of the sentences of each. Those without a token are left out."""
        documents = [kept for sentences in documents if (kept := [ids for ids in sentences if len(ids)])]
        if not documents:
            return
        sentences = [ids for document in documents for ids in document]
        ends = self.num_tokens + np.cumsum([len(ids) for ids in sentences])
        starts = np.concatenate([[self.num_tokens], ends[:-1]]).astype("<i8")
        firsts = np.concatenate([[0], np.cumsum([len(document) for document in documents])[:-1]]).astype(np.int64)
        tokens = np.concatenate(sentences)
        self._write("tokens", tokens.astype(self._dtype))
        self._write("sentences", starts)
        self._write("documents", starts[firsts])
        self.num_tokens = int(ends[-1])
        self.num_documents += len(documents)
        self.num_unknown += int(np.count_nonzero(self._is_unknown[tokens]))
        self.num_special += int(np.count_nonzero(self._is_special[tokens]))

    def _write(self, name: str, numbers: np.ndarray) -> None:
        content = numbers.tobytes()
        self._hash.update(name.encode() + content)
        self._files[name].write(content)


def _encode(texts: list[str], tokenizer: RunTokenizer, layout: Layout) -> list[list[np.ndarray]]:
    """The token ids of each document, cut at sentences (layout sentences) or only where it is very long."""
    split = split_sentences if layout == "sentences" else pieces
    parts = [list(split(text)) for text in texts]
    # In batches once more, for long documents: while it tokenises, the library takes many times the bytes of the text.
    batches = _batches(part for document in parts for part in document)
    encoded = (ids for batch in batches for ids in tokenizer.encode_batch(batch))
    documents = [[next(encoded) for _ in document] for document in parts]
    if layout == "sentences":
        return documents
    end = np.array([tokenizer.special_id("eos")], dtype=np.uint32)
    return [[np.concatenate([*ids, end])] if sum(map(len, ids)) else [] for ids in documents]


def split_sentences(text: str) -> Iterator[str]:
    """The sentences of a text; put together they are the text again.

    A sentence ends at a blank line; after . ! ? or … and closing quotes or brackets, if white space follows and then no
    lower-case letter, unless a single capital stands before the mark (an initial); and after 。！？. White space goes to the
    sentence behind it, where byte-level BPE wants it.
    """
    start = 0
    for match in _SENTENCE_END.finditer(text):
        follower = match.group(1)
        if follower is None or not follower.islower():
            yield from pieces(text[start : match.end()])
            start = match.end()
    yield from pieces(text[start:])


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) == _BATCH_TEXTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
