"""Tokenizers of a run: loaded from a file or trained on the sources; WordPiece, byte-level BPE and plain bytes."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from ...kernels.errors import UserError, refused
from ..config import DataConfig, SpecialToken, TokenizerConfig, TokenizerKind
from ..recipe import Recipe, Report
from .cache import cache_folder, open_or_build
from .progress import with_progress
from .run_tokenizer import SPECIALS_FILE, TOKENIZER_FILE, RunTokenizer, specials_settings
from .sources import Source, is_held_out, open_source
from .words import NUM_BYTES, byte_symbols

TRAINING_BYTES = 200 * 2**20  # of text, shared equally among the sources: vocabularies hardly change beyond it
_TRAINING_VERSION = 1  # raise it when the same sources and settings would give another tokenizer
_LONGEST_TEXT = 100_000  # characters tokenised as one text: a whole book as one would need gigabytes

_SPECIALS_MAP = "special_tokens_map.json"
_UNKNOWN = "[UNK]"  # of WordPiece
_USUAL_RULES = TokenizerConfig()
_WORDPIECE_RULES = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")
_LONGEST_WORD = 100  # characters; models.WordPiece takes a longer one for unknown
_LONGEST_TRAINED = 1_000  # characters without white space to train a tokenizer on, whose time grows with the square
# Tried in this order on a tokenizer without a specials file.
_USUAL_NAMES = {
    "pad": ("[PAD]", "<pad>", "<|padding|>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
    "eos": ("<|endoftext|>", "</s>", "<eos>"),
}


def build_tokenizer(recipe: Recipe, config: TokenizerConfig, data: DataConfig, report: Report) -> RunTokenizer:
    """Return the tokenizer of a new run: loaded if tokenizer.path is given, else trained on the sources.

    Held-out documents are left out. A trained one is kept in the cache under a hash of its sources and settings, so that equal
    run configs give equal runs although WordPiece training does not repeat itself.
    Raises UserError if it lacks a special token the model needs, or there is no text to train on.
    """
    if config.path is not None:
        tokenizer = given_tokenizer(config)
    else:
        kind = recipe.tokenizer.trained if config.type == "auto" else config.type
        tokenizer = _trained_once(recipe, kind, config, data, report)
    check_suits(recipe, tokenizer, config.path)
    return tokenizer


def given_tokenizer(config: TokenizerConfig) -> RunTokenizer:
    """Return the tokenizer that tokenizer.path names. Raises UserError as `load_tokenizer` does."""
    assert config.path is not None, "asked for without a path"
    return load_tokenizer(config.path, config)


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


def load_tokenizer(path: str | Path, config: TokenizerConfig = _USUAL_RULES) -> RunTokenizer:
    """Return the tokenizer in a tokenizer.json, a folder that holds one, or a WordPiece vocab.txt.

    config: says how text goes to a vocab.txt, where no tokenizer_config.json beside it does. Names of special tokens come from
    there too, else from special_tokens_map.json.
    Raises UserError if there is no such file or it does not hold a tokenizer.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        found = [path / name for name in (TOKENIZER_FILE, "vocab.txt") if (path / name).is_file()]
        if not found:
            why = f"it holds neither {TOKENIZER_FILE} nor vocab.txt"
            raise UserError(f"tokenizer.path={path}: {why}; name a folder that does")
        path = found[0]
    if not path.is_file():
        remedy = "correct it, or remove it to train one"
        raise UserError(f"tokenizer.path={path}: there is no such file or folder; {remedy}")
    settings = _read_settings(path.with_name(_SPECIALS_MAP)) | _read_settings(path.with_name(SPECIALS_FILE))
    if path.suffix == ".txt":
        chosen = {key: settings.get(key, getattr(config, key)) for key in _WORDPIECE_RULES}
        if any(not isinstance(value, bool | None) for value in chosen.values()):
            where = f"tokenizer.path: {path.with_name(SPECIALS_FILE)}"
            raise UserError(f"{where}: {', '.join(_WORDPIECE_RULES)} must be true or false; correct it")
        tokenizer = _wordpiece(_read_vocabulary(path), config.model_copy(update=chosen))
    else:
        with refused(f"tokenizer.path={path} cannot be read", "correct its permissions"):
            path.open("rb").close()
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


def _read_vocabulary(path: Path) -> models.WordPiece:
    try:
        with refused(f"tokenizer.path: {path} cannot be read", "correct its permissions"):
            tokens = path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"tokenizer.path={path}: byte {error.start:,} is not UTF-8; convert the file") from None
    if _UNKNOWN not in tokens:
        raise UserError(f"tokenizer.path={path}: the vocabulary has no {_UNKNOWN}; give one of BERT, a token per line")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return models.WordPiece(vocabulary, unk_token=_UNKNOWN)


def _wordpiece(model: models.WordPiece, rules: TokenizerConfig) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=rules.do_lower_case,
        strip_accents=rules.strip_accents,
        handle_chinese_chars=rules.tokenize_chinese_chars,
    )
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
        return _prepared(tokenizer, specials_settings(specials))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) if kind == "bpe" else []
    smallest = len(alphabet) + len(specials)
    if config.vocab_size <= smallest:
        need = f"a new {kind} tokenizer needs more than {smallest} symbols"
        raise UserError(f"tokenizer.vocab_size={config.vocab_size}: {need}; raise it")
    report(f"training a {kind} tokenizer of {config.vocab_size:,} symbols")
    symbols = list(specials.values())
    settings: dict[str, Any] = {"vocab_size": config.vocab_size, "special_tokens": symbols, "show_progress": False}
    if kind == "wordpiece":
        tokenizer = _wordpiece(models.WordPiece(unk_token=_UNKNOWN), config)
        usual = tokenizer.pre_tokenizer
        # A word longer than WordPiece takes is cut into parts, each a word.
        cut = pre_tokenizers.Split(Regex(f".{{{_LONGEST_WORD}}}"), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([usual, cut])
        trainer: Any = trainers.WordPieceTrainer(**settings)
    else:
        tokenizer = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **settings)
    lengths = _Lengths()
    tokenizer.train_from_iterator(lengths.of(documents), trainer)
    if kind == "wordpiece" and not lengths.long_word:
        tokenizer.pre_tokenizer = usual
    if tokenizer.get_vocab_size() > config.vocab_size:
        least = f"too few for the characters of the text; set at least {tokenizer.get_vocab_size()}"
        raise UserError(f"tokenizer.vocab_size={config.vocab_size}: {least}")
    return _prepared(tokenizer, specials_settings(specials))


class _Lengths:
    """Whether a text that is passed on has a word that is too long for WordPiece."""

    long_word = False

    def of(self, documents: Iterable[str]) -> Iterator[str]:
        """Yield the documents, cut behind _LONGEST_TRAINED characters without a space. Raises UserError if none is there."""
        empty = True
        for document in documents:
            empty = False
            self.long_word = self.long_word or re.search(rf"\S{{{_LONGEST_WORD + 1}}}", document) is not None
            start = 0
            if self.long_word:
                for match in re.finditer(rf"\S{{{_LONGEST_TRAINED}}}", document):
                    yield document[start : match.end()]
                    start = match.end()
            if start < len(document):
                yield document[start:]
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
    settings: list[Any] = [config.vocab_size, config.do_lower_case, data.validation_fraction]
    if (config.strip_accents, config.tokenize_chinese_chars) != (None, True):
        settings += [config.strip_accents, config.tokenize_chinese_chars]
    facts = [_TRAINING_VERSION, kind, recipe.name, *settings, [source.identity for source in sources]]
    name = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()

    def build(partial: Path) -> dict[str, Any]:
        text = _training_text(sources, data.validation_fraction, report)
        train_tokenizer(kind, config, text, report, specials=specials).save(partial)
        return {}

    open_or_build(cache / "tokenizers" / name, build, report)
    return load_tokenizer(cache / "tokenizers" / name)


def _training_text(sources: list[Source], validation_fraction: float, report: Report) -> Iterator[str]:
    """The first documents of each source, up to its share of TRAINING_BYTES, without held-out ones."""
    share, held_out, trained = TRAINING_BYTES // len(sources), 0, 0
    for source in sources:
        left = share
        for document in with_progress(source, f"counting words of {source.name}", report):
            if is_held_out(document, validation_fraction):
                held_out += 1
                continue
            trained += 1
            yield from pieces(document[:left])
            left -= len(document.encode())
            if left <= 0:
                break
    if held_out and not trained:
        raise UserError(
            f"data.validation_fraction={validation_fraction} holds out all of the {held_out:,} documents of data.sources, and "
            f"equal ones are on the same side; change it, or give held-out text as data.validation"
        )
    report("counted the words of the text; choosing the symbols among their parts")


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
