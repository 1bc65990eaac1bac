"""Where words begin and end, by what a tokenizer says of itself."""

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from tokenizers import Tokenizer

NUM_BYTES = 256
SPACE_MARKERS = ("Ġ", "Ċ", "ĉ", "▁")  # how byte-level BPE writes space, newline and tab; SentencePiece's space
# Characters of scripts without spaces between words: Thai to Tibetan, Myanmar, Khmer, kana, CJK with its punctuation and forms.
_UNSPACED = re.compile(
    "[\u0e00-\u109f\u1780-\u17ff\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]"
)
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")  # of a SentencePiece model that falls back to bytes


def borders_of_words(tokenizer: Tokenizer, word_start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return whether a word starts with each token and whether one ends with it, (V,) bool each, for masking.

    word_start: (V,) bool, the starts that `RunTokenizer.word_start` knows. Beyond them, each token of a model of whole words is
    one, a BPE may mark word ends, a pre-tokenizer may have its own sign for a space, and in scripts without spaces each token
    that begins with a character of theirs starts a word.
    """
    content = json.loads(tokenizer.to_str())
    model = content["model"]
    starts, ends = word_start.copy(), np.zeros(len(word_start), dtype=bool)
    spaces = (*SPACE_MARKERS, *_found(content["pre_tokenizer"], "replacement"))
    is_bytes = "ByteLevel" in _found([content["pre_tokenizer"], content["decoder"]], "type")
    byte_of = byte_symbols() if is_bytes else {}
    prefix, suffix = model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")
    for token, index in tokenizer.get_vocab(with_added_tokens=True).items():
        text = _token_text(token, byte_of)
        starts[index] |= model["type"] == "WordLevel" or bool(_UNSPACED.match(text))
        starts[index] |= not prefix and (token.startswith(spaces) or text[:1].isspace())
        ends[index] = bool(suffix and token.endswith(suffix)) or bool(not prefix and _UNSPACED.match(text[-1:]))
    return starts, ends


def byte_symbols() -> dict[str, int]:
    """Return the byte of each symbol of byte-level BPE: printable Latin-1 stands for itself, U+0100 and on for the rest."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(NUM_BYTES) if byte not in printable]
    return {chr(byte if byte in printable else 0x100 + others.index(byte)): byte for byte in range(NUM_BYTES)}


def _found(content: Any, key: str) -> list[str]:
    """Return the texts under `key` anywhere in a JSON value."""
    if isinstance(content, list):
        return [text for part in content for text in _found(part, key)]
    if not isinstance(content, dict):
        return []
    own = [content[key]] if isinstance(content.get(key), str) else []
    return own + _found(list(content.values()), key)


def _token_text(token: str, byte_of: Mapping[str, int]) -> str:
    """Return what a token stands for, as far as its first and last character are known.

    byte_of: the byte of each symbol of a byte-level tokenizer, else empty. A character that is cut off after its first bytes is
    read as the first one of those that begin so; one that is cut off before its last bytes is U+FFFD.
    """
    if byte_of:
        content = bytes(byte_of.get(symbol, 0) for symbol in token)
    elif match := _BYTE_TOKEN.fullmatch(token):
        content = bytes([int(match[1], 16)])
    else:
        return token
    for filled in (content, content + b"\x80", content + b"\x80\x80", content + b"\x80\x80\x80"):
        try:
            return filled.decode() + ("" if filled is content else "\ufffd")
        except UnicodeDecodeError:
            continue
    return content.decode(errors="replace")
