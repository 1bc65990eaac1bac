"""The tokenizer of a run: texts to ids and back, special tokens, words, files."""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, pre_tokenizers

from ...kernels.errors import refused
from ..config import SpecialToken
from .cache import whole_folder
from .words import SPACE_MARKERS, borders_of_words

TOKENIZER_FILE = "tokenizer.json"
SPECIALS_FILE = "tokenizer_config.json"  # names and place as in `transformers`, which can read the folder


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
        content = _with_first_space_only(json.loads(self.tokenizer.to_str()))
        # `encode_batch` adds no special tokens and finds none.
        added = [token | {"lstrip": False} if token["special"] else token for token in content["added_tokens"]]
        # An export of a GPT pads with eos, which is no symbol of its own.
        specials = {
            name: token for name, token in self.specials.items() if name == "eos" or token != self.specials.get("eos")
        }
        return {**content, "post_processor": None, "added_tokens": added, "specials": specials}

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text without special tokens, uint32; on several threads unless TOKENIZERS_PARALLELISM=false."""
        if self.kind == "bytes":
            return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32) for text in texts]
        encodings = self._of_plain_text.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def reader(self) -> Tokenizer:
        """Return a copy for people's texts, in which special tokens are symbols, and a mask is as in a training sample.

        There the white space in front of a masked word belongs to the word. So a mask takes it up where it would be a token,
        and no space is put in front of what follows a mask at once.
        """
        content = json.loads(self.tokenizer.to_str())
        mask = self.specials.get("mask")
        if mask is not None:
            plain = Tokenizer.from_str(json.dumps(content))
            before, after = (plain.encode(text, add_special_tokens=False).ids for text in ("a", f"a {mask}"))
            content = _with_first_space_only(content)
            for token in content["added_tokens"]:
                token["lstrip"] |= token["content"] == mask and after != [*before, self._id(mask)]
        return Tokenizer.from_str(json.dumps(content))

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
            (partial / TOKENIZER_FILE).write_text(self.tokenizer.to_str(pretty=True), encoding="utf-8")
            config = {"tokenizer_class": "PreTrainedTokenizerFast", **specials_settings(self.specials)}
            (partial / SPECIALS_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


def _with_first_space_only(content: Any) -> Any:
    """Return the JSON of a tokenizer, with a space in front of the text where it had one in front of every stretch of it.

    Stretches end at added tokens, so both read a text without such tokens alike.
    """
    if isinstance(content, list):
        return [_with_first_space_only(part) for part in content]
    if not isinstance(content, dict):
        return content
    if content.get("prepend_scheme") == "always":
        return content | {"prepend_scheme": "first"}
    bytes_of = content.get("pre_tokenizer") or {}
    if bytes_of.get("type") == "ByteLevel" and bytes_of["add_prefix_space"]:
        first = {"type": "Metaspace", "replacement": " ", "prepend_scheme": "first", "split": False}
        steps = [first, bytes_of | {"add_prefix_space": False}]
        return content | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    return {key: _with_first_space_only(value) for key, value in content.items()}


def specials_settings(specials: Mapping[Any, str]) -> dict[str, str]:
    """Return what tokenizer_config.json says of special tokens by their names here."""
    return {f"{name}_token": token for name, token in specials.items()}
