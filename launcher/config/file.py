"""Run-config files: YAML or JSON text to plain values with line numbers, and values back to YAML.

Values follow the YAML 1.2 core schema, in which `11e-3` is a number and `on`, `1:30` and `2024-01-01` are text (PyYAML by
itself follows YAML 1.1, which reads them otherwise). Torch-free.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ...kernels.errors import UserError

KeyPath = tuple[str | int, ...]

TAG = "tag:yaml.org,2002:"
INT64 = range(-(2**63), 2**63)
MOST_DEPTH = 64
MOST_VALUES = 10_000  # with what aliases stand for written out: a few hundred bytes of them can mean billions of values
JSON_STRING = re.compile(r'("(?:[^"\\]|\\.)*")(\s*)(:?)')


def _integer(text: str) -> int:
    """Return a number of YAML's core schema. Raises OverflowError if it needs more than 64 bits."""
    value = 2**63 if len(text) > 100 else int(text, 0) if text.startswith(("0o", "0x")) else int(text)
    if value not in INT64:
        raise OverflowError
    return value


# The kinds of plain text: how the text looks, the characters it may start with, and its value.
KINDS = {
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789", _integer),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
        lambda text: float(re.sub(r"\.(?=[inIN])", "", text)),
    ),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF", lambda text: text.lower() == "true"),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""], lambda text: None),
}


class _LimitError(yaml.MarkedYAMLError):
    """Well-formed YAML that is too deep or too large."""


class _Loader(yaml.SafeLoader):
    """Knows no kind of plain text but KINDS, and no nesting deeper than MOST_DEPTH."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012  PyYAML's own is a plain dictionary of the class too
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise _LimitError(problem=_TOO_DEEP, problem_mark=self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or YAML 1.2 would read as something else."""


_TOO_DEEP = f"nested more than {MOST_DEPTH} deep"
for _kind, (_pattern, _first, _) in KINDS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(TAG + _kind, re.compile(f"^(?:{_pattern})$"), list(_first))


class ConfigError(UserError):
    """A run config that cannot be used; `problems` has one line for each fault, with file and line where known."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = [printable(problem) for problem in problems]
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True)
class ConfigTree:
    """The mapping in a file, and the line on which each key and list item stands."""

    values: dict[str, Any]
    lines: dict[KeyPath, int]


def read_tree(path: Path) -> ConfigTree:
    """Return the mapping in a YAML file, or in a JSON file when the name ends in .json.

    Raises ConfigError when the file is missing, not UTF-8 text, not well formed, not a mapping, or repeats a key.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such file (the current folder is {Path.cwd()})"]) from None
    except IsADirectoryError:
        raise ConfigError([f"{path}: is a folder; give a YAML or JSON file"]) from None
    except UnicodeDecodeError as error:
        byte = f"byte {error.object[error.start]:#04x} at position {error.start}"
        raise ConfigError([f"{path}: {byte} is not UTF-8 text"]) from None
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}; correct its permissions"]) from None
    reader = _Reader("the file")
    if text.strip() and path.suffix.lower() == ".json":
        try:
            json.loads(text, parse_int=str)
        except json.JSONDecodeError as error:
            raise ConfigError([f"{path}:{error.lineno}: not well-formed JSON: {error.msg}"]) from None
        except RecursionError:
            raise ConfigError([f"{path}: {_TOO_DEEP}"]) from None
        # JSON is YAML but for tabs, and for a colon on the line after its key. A tab in well-formed JSON is always white space
        # between tokens, because strings may not hold one.
        text = JSON_STRING.sub(r"\1\3\2", text.replace("\t", " "))
    values = reader.read(text)
    if reader.faults:
        raise ConfigError([f"{path}:{line}: {fault}" for line, fault in reader.faults])
    if values is None:
        raise ConfigError([f"{path}: is empty; a run config has at least the section training"])
    if not isinstance(values, dict):
        raise ConfigError([f"{path}:1: holds {describe(values)}, where a mapping of sections is wanted"])
    return ConfigTree(values, reader.lines)


def parse_value(text: str) -> Any:
    """Return the value that `text` denotes in YAML. Raises UserError when it is not one well-formed YAML value."""
    reader = _Reader("the value")
    value = reader.read(text)
    if reader.faults:
        raise UserError("; ".join(fault for _, fault in reader.faults))
    return value


class _Reader:
    """Turns YAML text into values, and collects the line of each key and all faults on the way."""

    def __init__(self, whole: str) -> None:
        self._whole = whole
        self.lines: dict[KeyPath, int] = {}
        self.faults: list[tuple[int, str]] = []
        self._open: list[yaml.Node] = []
        self._count = 0

    def read(self, text: str) -> Any:
        """Return the value of the only document in `text`, None if there is none."""
        try:
            node = yaml.compose(text, Loader=_Loader)
            return None if node is None else self._value(node, ())
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            what = ", ".join(part for part in (error.context, error.problem) if part)
            self.faults = [(line, what if isinstance(error, _LimitError) else f"not well-formed YAML: {what}")]
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            self.faults = [(line, f"control character {error.character:#04x} in the text")]
        return None

    def _fault(self, node: yaml.Node, path: KeyPath, text: str) -> Any:
        self.faults.append((node.start_mark.line + 1, f"{dotted(path) or self._whole}: {text}"))

    def _value(self, node: yaml.Node, path: KeyPath) -> Any:
        self._count += 1
        if any(node is outer for outer in self._open):
            return self._fault(node, path, "an alias may not contain itself")
        if len(path) >= MOST_DEPTH or self._count > MOST_VALUES:
            what = _TOO_DEEP if self._count <= MOST_VALUES else f"more than {MOST_VALUES:,} values"
            raise _LimitError(problem=f"{what}, with its aliases written out", problem_mark=node.start_mark)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        is_mapping = isinstance(node, yaml.MappingNode)
        if node.tag != TAG + ("map" if is_mapping else "seq"):
            return self._fault(node, path, f"the tag {node.tag} has no meaning here")
        self._open.append(node)
        value = self._mapping(node, path) if is_mapping else self._list(node, path)
        self._open.pop()
        return value

    def _list(self, node: yaml.Node, path: KeyPath) -> list[Any]:
        self.lines |= {(*path, index): item.start_mark.line + 1 for index, item in enumerate(node.value)}
        return [self._value(item, (*path, index)) for index, item in enumerate(node.value)]

    def _mapping(self, node: yaml.Node, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != TAG + "str":
                shown = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
                self._fault(key_node, path, f"a key must be text, and {shown} is not")
                continue
            key = self._text(key_node, path)
            inside = (*path, key)
            if key in values:
                self._fault(key_node, inside, f"given twice, first on line {self.lines[inside]}")
                continue
            self.lines[inside] = key_node.start_mark.line + 1
            values[key] = self._value(value_node, inside)
        return values

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        kind, text = node.tag.removeprefix(TAG), node.value
        if kind == "str":
            return self._text(node, path)
        pattern, _, convert = KINDS.get(kind, (None, "", str))
        if pattern is None or not re.fullmatch(pattern, text):
            return self._fault(node, path, f"the tag {node.tag} of {text!r} has no meaning here")
        try:
            return convert(text)
        except OverflowError:
            shown = text if len(text) <= 100 else f"a number of {len(text):,} digits"
            return self._fault(node, path, f"got {shown}, must fit in 64 bits")

    def _text(self, node: yaml.ScalarNode, path: KeyPath) -> str:
        """Return the text with pairs of surrogates, which JSON escapes give, made one character each."""
        text: str = node.value
        try:
            return text if text.isascii() else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
        except UnicodeDecodeError:
            self._fault(node, path, f"{text!r} holds half of a surrogate pair, which is no character")
            return text


def printable(text: str) -> str:
    """Return text on one line that any terminal shows, with escapes for control characters and the like."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def dotted(path: KeyPath) -> str:
    """`("data", "sources", 0)` as `data.sources.0`."""
    return ".".join(str(part) for part in path)


def describe(value: Any) -> str:
    """Return a value and its kind, in words for an error: `'4' (text)`, `true`, `an empty list`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return f"{value!r} (text)"
    return "a mapping" if isinstance(value, Mapping) else "a list" if value else "an empty list"


def plain_values(values: Mapping[str, Any], path: KeyPath = ()) -> dict[str, bool | int | float | str]:
    """Return the values by dotted key; lists and nulls as YAML text."""
    found: dict[str, bool | int | float | str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= plain_values(value, (*path, key))
        else:
            found[dotted((*path, key))] = value if isinstance(value, bool | int | float | str) else _flow(value)
    return found


def to_yaml(values: Mapping[str, Any], origins: Mapping[str, str] | None = None) -> str:
    """Return YAML text that reads back to the same values; with `origins` each is followed by `# where it comes from`."""
    rows = list(_rows(values, (), ""))
    if origins is None:
        return "".join(text + "\n" for _, text in rows)
    width = min(60, max(len(text) for _, text in rows))
    notes = [printable(origins.get(dotted(path), "")) for path, _ in rows]
    pairs = zip(rows, notes, strict=True)
    return "".join(f"{text:<{width}}  # {note}\n" if note else f"{text}\n" for (_, text), note in pairs)


def _rows(value: Mapping[str, Any] | list, path: KeyPath, indent: str) -> Any:
    """Return pairs of key path and YAML line, depth first. A list of mappings is in block style, any other list on one line."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    for key, item in items:
        head = "-" if isinstance(key, int) else f"{_flow(key)}:"
        if is_leaf(item):
            yield (*path, key), f"{indent}{head} {_flow(item)}"
        elif head == "-":
            first, *rest = _rows(item, (*path, key), indent + "  ")
            yield first[0], f"{indent}- {first[1].lstrip()}"
            yield from rest
        else:
            yield (*path, key), f"{indent}{head}"
            yield from _rows(item, (*path, key), indent + "  ")


def is_leaf(value: Any) -> bool:
    """Return whether a value stands on one line: a scalar, an empty mapping, or a list that holds anything but mappings."""
    if isinstance(value, Mapping):
        return not value
    if isinstance(value, list):
        return not value or not all(isinstance(item, Mapping) and item for item in value)
    return True


def _flow(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return repr(value)
    form: Any = {"default_flow_style": True, "sort_keys": False, "allow_unicode": True, "width": math.inf}
    text: str = yaml.dump(value, Dumper=_Dumper, **form)
    return text.removesuffix("\n").removesuffix("\n...")
