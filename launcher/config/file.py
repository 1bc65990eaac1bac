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

INT = re.compile(r"^[-+]?[0-9]+$|^0o[0-7]+$|^0x[0-9a-fA-F]+$")
FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$")
BOOL = re.compile(r"^(true|True|TRUE|false|False|FALSE)$")
NULL = re.compile(r"^(~|null|Null|NULL|)$")
TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Knows no kind of plain text but those added below."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or YAML 1.2 would read as something else."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (("int", INT, "-+0123456789"), ("float", FLOAT, "-+.0123456789")):
    _Loader.add_implicit_resolver(TAG + _tag, _pattern, list(_first))
    _Dumper.add_implicit_resolver(TAG + _tag, _pattern, list(_first))
_Loader.add_implicit_resolver(TAG + "bool", BOOL, list("tTfF"))
_Loader.add_implicit_resolver(TAG + "null", NULL, ["~", "n", "N", ""])


class ConfigError(UserError):
    """A run config that cannot be used; `problems` has one sentence for each fault, with file and line where known."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True)
class ConfigTree:
    """The mapping in a file, and the line on which each key and list item stands."""

    values: dict[str, Any]
    lines: dict[KeyPath, int]


def read_tree(path: Path) -> ConfigTree:
    """The mapping in a YAML file, or in a JSON file when the name ends in .json.

    Raises ConfigError when the file is missing, not UTF-8 text, not well formed, not a mapping, or repeats a key.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such file (the current folder is {Path.cwd()})"]) from None
    except IsADirectoryError:
        raise ConfigError([f"{path}: is a folder; give a YAML or JSON file"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            [f"{path}: byte {error.object[error.start]:#04x} at position {error.start} is not UTF-8 text"]
        ) from None
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None
    return _parse_json(text, path) if path.suffix.lower() == ".json" else _parse_yaml(text, path)


def parse_value(text: str) -> Any:
    """The value that `text` denotes in YAML. Raises ValueError when it is not one well-formed YAML value."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        reader = _NodeReader()
        value = None if node is None else reader.value(node, ())
    except yaml.YAMLError as error:
        raise UserError(_yaml_fault(error)) from None
    if reader.faults:
        raise UserError("; ".join(fault for _, fault in reader.faults))
    return value


def _parse_yaml(text: str, path: Path) -> ConfigTree:
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError([f"{path}:{line}: not well-formed YAML: {_yaml_fault(error)}"]) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError([f"{path}:{line}: control character {error.character:#04x} in the text"]) from None
    if node is None:
        raise ConfigError([f"{path}: is empty; a run config has at least the section training"])
    reader = _NodeReader()
    values = reader.value(node, ())
    if reader.faults:
        raise ConfigError([f"{path}:{line}: {fault}" for line, fault in reader.faults])
    if not isinstance(values, dict):
        raise ConfigError([f"{path}:1: holds {describe(values)}, where a mapping of sections is wanted"])
    return ConfigTree(values, reader.lines)


def _parse_json(text: str, path: Path) -> ConfigTree:
    if not text.strip():
        raise ConfigError([f"{path}: is empty; a run config has at least the section training"])
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError([f"{path}:{error.lineno}: not well-formed JSON: {error.msg}"]) from None
    # Line numbers come from the YAML composer, since JSON is YAML but for tabs. A tab in well-formed JSON is always white
    # space between tokens, because strings may not hold one.
    return ConfigTree(values, _parse_yaml(text.replace("\t", " "), path).lines)


def _yaml_fault(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        return str(error)
    return ", ".join(part for part in (error.context, error.problem) if part)


class _NodeReader:
    """Turns YAML nodes into values, and collects the line of each key and all faults on the way."""

    def __init__(self) -> None:
        self.lines: dict[KeyPath, int] = {}
        self.faults: list[tuple[int, str]] = []
        self._open: list[yaml.Node] = []

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        if any(node is outer for outer in self._open):
            self.faults.append((node.start_mark.line + 1, f"{dotted(path)}: an alias may not contain itself"))
            return None
        self._open.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode):
                for index, item in enumerate(node.value):
                    self.lines[(*path, index)] = item.start_mark.line + 1
                return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
            assert isinstance(node, yaml.ScalarNode), "YAML has three kinds of nodes"
            return self._scalar(node, path)
        finally:
            self._open.pop()

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != TAG + "str":
                self.faults.append((line, f"{dotted(path) or 'the file'}: a key must be text, and {key} is not"))
                continue
            if key in values:
                first = self.lines[(*path, key)]
                self.faults.append((line, f"{dotted((*path, key))}: given twice, first on line {first}"))
                continue
            self.lines[(*path, key)] = line
            values[key] = self.value(value_node, (*path, key))
        return values

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        kind, text = node.tag.removeprefix(TAG), node.value
        if kind == "str":
            return text
        if kind == "null" and NULL.match(text):
            return None
        if kind == "bool" and BOOL.match(text):
            return text.lower() == "true"
        if kind == "int" and INT.match(text):
            return int(text, 0) if text.startswith(("0o", "0x")) else int(text)
        if kind == "float" and FLOAT.match(text):
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        self.faults.append((node.start_mark.line + 1, f"{dotted(path)}: {node.tag} {text!r} has no meaning here"))
        return None


def dotted(path: KeyPath) -> str:
    """`("data", "sources", 0)` as `data.sources.0`."""
    return ".".join(str(part) for part in path)


def describe(value: Any) -> str:
    """A value and its kind, in words for an error: `'4' (text)`, `true`, `an empty list`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return f"{value!r} (text)"
    return "a mapping" if isinstance(value, Mapping) else "a list" if value else "an empty list"


def to_yaml(values: Mapping[str, Any], origins: Mapping[str, str] | None = None) -> str:
    """YAML text that reads back to the same values; with `origins`, each value is followed by `# where it comes from`."""
    rows = list(_rows(values, (), ""))
    if origins is None:
        return "".join(text + "\n" for _, text in rows)
    width = min(60, max(len(text) for _, text in rows))
    notes = [origins.get(dotted(path), "") for path, _ in rows]
    return "".join(
        f"{text:<{width}}  # {note}\n" if note else f"{text}\n" for (_, text), note in zip(rows, notes, strict=True)
    )


def _rows(value: Mapping[str, Any] | list, path: KeyPath, indent: str) -> Any:
    """Pairs of key path and YAML line, depth first. A list of mappings is in block style, any other list on one line."""
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
    """Whether a value stands on one line: a scalar, an empty mapping, or a list that holds anything but mappings."""
    if isinstance(value, Mapping):
        return not value
    if isinstance(value, list):
        return not value or not all(isinstance(item, Mapping) and item for item in value)
    return True


def _flow(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return repr(value)
    text = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf
    )
    return text.removesuffix("\n").removesuffix("\n...")
