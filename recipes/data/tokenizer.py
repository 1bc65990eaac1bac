"""Tokenizers: loaded from a file or trained on the sources; WordPiece, byte-level BPE and plain bytes."""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from ...kernels.errors import UserError, refused
from ..config import DataConfig, SpecialToken, TokenizerConfig, TokenizerKind
from ..recipe import Recipe, Report
from .cache import cache_folder, open_or_build, whole_folder
from .sources import Source, is_held_out, open_source
from .words import NUM_BYTES, SPACE_MARKERS, borders_of_words, byte_symbols

TRAINING_BYTES = 200 * 2**20  # of text, shared equally among the sources: vocabularies hardly change beyond it
_TRAINING_VERSION = 1  # raise it when the same sources and settings would give another tokenizer
_LONGEST_TEXT = 100_000  # characters tokenised as one text: a whole book as one would need gigabytes

_TOKENIZER_FILE = "tokenizer.json"
_SPECIALS_FILE = "tokenizer_config.json"  # names and place as in `transformers`, which can read the folder
_UNKNOWN = "[UNK]"  # of WordPiece
# Tried in this order on a tokenizer without a specials file.
_USUAL_NAMES = {
    "pad": ("[PAD]", "<pad>", "<|padding|>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
    "eos": ("<|endoftext|>", "</s>", "<eos>"),
}


@dataclass(frozen=True)
class RunTokenizer:
    """A tokenizer and the special tokens the recipes use.

    kind: wordpiece, bpe, bytes, or what else a loaded file holds; specials: the tokens called pad, unk, cls, sep, mask and
    eos, those it has. Special tokens written out in a text are read as plain text.
    """

    tokenizer: Tokenizer
    kind: str
    specials: dict[str, str]

    @functools.cached_property
    def vocab_size(self) -> int:
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def special_id(self, name: SpecialToken) -> int:
        """The id of a special token. Raises KeyError if the tokenizer does not have it."""
        return self._id(self.specials[name])

    def _id(self, token: str) -> int:
        index = self.tokenizer.token_to_id(token)
        assert index is not None, f"special token {token} is not in the vocabulary"
        return int(index)

    @functools.cached_property
    def special_ids(self) -> np.ndarray:
        """Ids of all tokens that stand for no text, ascending, int64."""
        ids = {index for index, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        return np.array(sorted(ids | {self._id(token) for token in self.specials.values()}), np.int64)

    @functools.cached_property
    def unknown_ids(self) -> set[int]:
        """Ids of what stands for text that the tokenizer does not know: its model's own, and the one called unk."""
        model = json.loads(self.tokenizer.to_str())["model"]
        tokens = {self.specials.get("unk"), model.get("unk_token")} - {None}
        by_number = {model["unk_id"]} if model.get("unk_id") is not None else set()
        return by_number | {index for token in tokens if (index := self.tokenizer.token_to_id(token)) is not None}

    @functools.cached_property
    def word_start(self) -> np.ndarray:
        """Whether a word starts with each token, (vocab_size,) bool.

        WordPiece: tokens without the ## of a continuation. Otherwise tokens that begin with white space (which BPE and
        SentencePiece keep in front of a word), so that punctuation belongs to the word before it.
        """
        starts = np.zeros(self.vocab_size, dtype=bool)
        continuation = json.loads(self.tokenizer.to_str())["model"].get("continuing_subword_prefix")
        for token, index in self.tokenizer.get_vocab(with_added_tokens=True).items():
            starts[index] = not token.startswith(continuation) if continuation else token.startswith(SPACE_MARKERS)
        starts[self.special_ids] = True
        return starts

    @functools.cached_property
    def word_borders(self) -> tuple[np.ndarray, np.ndarray]:
        """Whether a word starts with each token, and whether one ends with it, (vocab_size,) bool each."""
        return borders_of_words(self.tokenizer, self.word_start)

    @functools.cached_property
    def _of_plain_text(self) -> Tokenizer:
        """The tokenizer, where its model cannot find special tokens that a text writes out; else a copy that parts them.

        The copy parts a text behind the first character of each special token, after all other steps before the model.
        """
        tokens = [str(self.tokenizer.id_to_token(index)) for index in self.special_ids]
        parted = sorted((token for token in tokens if len(token) > 1), key=len, reverse=True)
        ids = set(self.special_ids.tolist()) - self.unknown_ids
        probes = [text for token in parted for text in (token, f"a {token} a", f"a{token}a", 2 * token)]
        if all(ids.isdisjoint(one.ids) for one in self.tokenizer.encode_batch(probes, add_special_tokens=False)):
            return self.tokenizer
        copy = Tokenizer.from_str(self.tokenizer.to_str())
        copy.encode_special_tokens = True
        pattern = Regex("|".join(f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in parted))
        split = pre_tokenizers.Split(pattern, "isolated")
        steps = [split] if copy.pre_tokenizer is None else [copy.pre_tokenizer, split]
        copy.pre_tokenizer = pre_tokenizers.Sequence(steps)
        return copy

    @functools.cached_property
    def fingerprint(self) -> str:
        """Equal for tokenizers that turn every text into the same ids."""
        content = json.dumps([json.loads(self._of_plain_text.to_str()), self.specials], sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def equals(self, other: "RunTokenizer") -> bool:
        """Whether both turn every text into the same ids, whatever each of them adds to texts elsewhere."""
        return self._content() == other._content()

    def _content(self) -> dict[str, Any]:
        unused = {"post_processor": None}  # `encode_batch` adds no special tokens
        return {**json.loads(self.tokenizer.to_str()), **unused, "specials": self.specials}

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text without special tokens, uint32; on several threads unless TOKENIZERS_PARALLELISM=false."""
        if self.kind == "bytes":
            return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32) for text in texts]
        encodings = self._of_plain_text.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids, special tokens included."""
        text: str = self.tokenizer.decode([int(index) for index in ids], skip_special_tokens=False)
        return text

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json; `folder` comes into being whole or not at all."""
        folder = Path(folder)
        with (
            refused(f"cannot write {folder}", "free space there, or make it writable"),
            whole_folder(folder) as partial,
        ):
            (partial / _TOKENIZER_FILE).write_text(self.tokenizer.to_str(pretty=True), encoding="utf-8")
            config = {"tokenizer_class": "PreTrainedTokenizerFast", **_settings(self.specials)}
            (partial / _SPECIALS_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


def build_tokenizer(recipe: Recipe, config: TokenizerConfig, data: DataConfig, report: Report) -> RunTokenizer:
    """Return the tokenizer of a new run: loaded if tokenizer.path is given, else trained on the sources.

    Held-out documents are left out. A trained one is kept in the cache under a hash of its sources and settings, so that equal
    run configs give equal runs although WordPiece training does not repeat itself.
    Raises UserError if it lacks a special token the model needs, or there is no text to train on.
    """
    if config.path is not None:
        tokenizer = load_tokenizer(config.path, lowercase=config.do_lower_case)
    else:
        kind = recipe.tokenizer.trained if config.type == "auto" else config.type
        tokenizer = _trained_once(recipe, kind, config, data, report)
    check_suits(recipe, tokenizer, config.path)
    return tokenizer


def check_suits(recipe: Recipe, tokenizer: RunTokenizer, path: str | None = None) -> None:
    """Raise UserError if the tokenizer lacks a special token that the model's samples are built with."""
    missing = [name for name in recipe.tokenizer.needed if name not in tokenizer.specials]
    if missing:
        names = " and ".join(f'"{name}_token"' for name in missing)
        raise UserError(
            f"tokenizer.path={path}: a {recipe.name} needs {', '.join(missing)} among the special tokens, and this tokenizer "
            f"has {', '.join(tokenizer.specials) or 'none'}; name {names} in a tokenizer_config.json beside tokenizer.json, or "
            f"remove tokenizer.path to train one"
        )


def load_tokenizer(path: str | Path, *, lowercase: bool = True) -> RunTokenizer:
    """The tokenizer in a tokenizer.json, a folder that holds one, or a WordPiece vocab.txt.

    lowercase: for vocab.txt only, unless a tokenizer_config.json beside it says do_lower_case.

    Raises ValueError if there is no such file or it does not hold a tokenizer.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        found = [path / name for name in (_TOKENIZER_FILE, "vocab.txt") if (path / name).is_file()]
        if not found:
            raise UserError(
                f"tokenizer.path={path}: it holds neither tokenizer.json nor vocab.txt; name a folder that does"
            )
        path = found[0]
    if not path.is_file():
        raise UserError(
            f"tokenizer.path={path}: there is no such file or folder; correct it, or remove it to train one"
        )
    settings = _read_settings(path.with_name(_SPECIALS_FILE))
    if path.suffix == ".txt":
        tokenizer = _from_vocabulary(path, lowercase=settings.get("do_lower_case", lowercase))
    else:
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the only type that `tokenizers` raises
            raise UserError(f"tokenizer.path={path}: not a tokenizer file ({error})") from error
    return _prepared(tokenizer, settings)


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    with refused(f"tokenizer.path: {path} cannot be read", "correct its permissions"):
        content = path.read_bytes()
    try:
        settings = json.loads(content)
    except ValueError as error:
        raise UserError(f"tokenizer.path: {path} is not JSON ({error}); correct or remove it") from None
    if not isinstance(settings, dict):
        raise UserError(f"tokenizer.path: {path} must be one JSON object, not a {type(settings).__name__}; correct it")
    return settings


def _prepared(tokenizer: Tokenizer, settings: dict[str, Any]) -> RunTokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    kind = _kind(tokenizer)
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    specials = {}
    for name, usual in _USUAL_NAMES.items():
        given = settings.get(f"{name}_token")
        given = given["content"] if isinstance(given, dict) else given
        # A learned token may read "</s>" too; only in WordPiece, which parts brackets from words, no text can give one.
        candidates = [given] if given else [token for token in usual if token in known or kind == "wordpiece"]
        found = [token for token in candidates if tokenizer.token_to_id(token) is not None]
        if found:
            specials[name] = found[0]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials.values() if token not in known])
    # A text that contains "[MASK]" or "<|endoftext|>" must not put special tokens into the samples.
    tokenizer.encode_special_tokens = True
    return RunTokenizer(tokenizer, kind, specials)


def _kind(tokenizer: Tokenizer) -> str:
    model = json.loads(tokenizer.to_str())["model"]
    kind: str = model["type"].lower()
    is_bytes = kind == "bpe" and not model["merges"] and len(model["vocab"]) == NUM_BYTES
    return "bytes" if is_bytes else kind


def _from_vocabulary(path: Path, *, lowercase: bool) -> Tokenizer:
    try:
        with refused(f"tokenizer.path: {path} cannot be read", "correct its permissions"):
            tokens = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"tokenizer.path={path}: byte {error.start:,} is not UTF-8; convert the file") from None
    if _UNKNOWN not in tokens:
        raise UserError(
            f"tokenizer.path={path}: the vocabulary has no {_UNKNOWN}; it must be BERT's, one token per line"
        )
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return _wordpiece(models.WordPiece(vocabulary, unk_token=_UNKNOWN), lowercase=lowercase)


def _wordpiece(model: models.WordPiece, *, lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_tokenizer(
    kind: TokenizerKind,
    config: TokenizerConfig,
    documents: Iterable[str],
    report: Report,
    *,
    specials: Mapping[SpecialToken, str],
) -> RunTokenizer:
    """Return a new tokenizer of config.vocab_size symbols, or of 256 bytes and the special tokens, which reads no documents.

    specials: its special tokens, as they are written. WordPiece training gives another vocabulary each time, even on the same
    text: train once, then save and load.
    Raises UserError if the text is empty or has too few different symbols for the size asked for.
    """
    if kind == "bytes":
        tokenizer = _byte_level(models.BPE(vocab=byte_symbols(), merges=[]))
        tokenizer.add_special_tokens(list(specials.values()))
        return _prepared(tokenizer, _settings(specials))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) if kind == "bpe" else []
    smallest = len(alphabet) + len(specials)
    if config.vocab_size <= smallest:
        raise UserError(
            f"tokenizer.vocab_size={config.vocab_size}: a new {kind} tokenizer needs more than {smallest} symbols"
        )
    report(f"training a {kind} tokenizer of {config.vocab_size:,} symbols")
    symbols = list(specials.values())
    settings: dict[str, Any] = {"vocab_size": config.vocab_size, "special_tokens": symbols, "show_progress": False}
    if kind == "wordpiece":
        tokenizer = _wordpiece(models.WordPiece(unk_token=_UNKNOWN), lowercase=config.do_lower_case)
        trainer: Any = trainers.WordPieceTrainer(**settings)
    else:
        tokenizer = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **settings)
    tokenizer.train_from_iterator(_counted(documents), trainer)
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise UserError(
            f"tokenizer.vocab_size={config.vocab_size}: too few for the characters of the text; set at least "
            f"{tokenizer.get_vocab_size()}"
        )
    return _prepared(tokenizer, _settings(specials))


def _settings(specials: Mapping[Any, str]) -> dict[str, str]:
    return {f"{name}_token": token for name, token in specials.items()}


def _counted(documents: Iterable[str]) -> Iterator[str]:
    empty = True
    for document in documents:
        empty = False
        yield document
    if empty:
        raise UserError("data.sources hold no text to train a tokenizer on; add text")


def _trained_once(
    recipe: Recipe, kind: TokenizerKind, config: TokenizerConfig, data: DataConfig, report: Report
) -> RunTokenizer:
    specials = recipe.tokenizer.specials
    if kind == "bytes":
        return train_tokenizer(kind, config, (), report, specials=specials)
    cache = cache_folder(data.cache_dir)
    sources = [open_source(source, cache) for source in data.sources]
    settings = [config.vocab_size, config.do_lower_case, data.validation_fraction]
    facts = [_TRAINING_VERSION, kind, recipe.name, *settings, [source.identity for source in sources]]
    name = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()

    def build(partial: Path) -> dict[str, Any]:
        text = _training_text(sources, data.validation_fraction)
        train_tokenizer(kind, config, text, report, specials=specials).save(partial)
        return {}

    open_or_build(cache / "tokenizers" / name, build, report)
    return load_tokenizer(cache / "tokenizers" / name)


def _training_text(sources: list[Source], validation_fraction: float) -> Iterator[str]:
    """The first documents of each source, up to its share of TRAINING_BYTES, without held-out ones."""
    share = TRAINING_BYTES // len(sources)
    for source in sources:
        left = share
        for document in source.documents():
            if is_held_out(document, validation_fraction):
                continue
            yield from pieces(document[:left])
            left -= len(document.encode())
            if left <= 0:
                break


def pieces(text: str) -> Iterator[str]:
    """The text in pieces of at most _LONGEST_TEXT characters, cut before white space if there is any."""
    start = 0
    while len(text) - start > _LONGEST_TEXT:
        end = start + _LONGEST_TEXT
        space = max(text.rfind(" ", start + 1, end), text.rfind("\n", start + 1, end))
        end = space if space > 0 else end
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]
