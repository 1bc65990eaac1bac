"""Reading a run config: schema default < file < `--set a.b=c` < named flag, with every problem in one report. Torch-free."""

import difflib
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ...kernels.errors import UserError
from ...recipes.config import from_home
from .deepspeed_keys import KNOWN_KEYS, REMOVED_KEYS
from .file import INT64, ConfigError, KeyPath, describe, dotted, is_leaf, parse_value, read_tree, to_yaml
from .flags import FLAG_OF_KEY
from .phase_checks import faults_of_all_phases
from .schema import RUN_LENGTHS, RunConfig

__all__ = ["ConfigError", "LoadedConfig", "dump_config", "load_config"]

# Of keys that exclude each other, the one from the higher layer replaces the others: `--max_steps 10` tries out a config
# that gives num_epochs. Two in one layer are an error.
EXCLUSIVE: tuple[tuple[KeyPath, ...], ...] = (
    tuple(("training", name) for name in RUN_LENGTHS),
    (("schedule", "warmup_steps"), ("schedule", "warmup_proportion")),
)
DEEPSPEED_KEYS = KNOWN_KEYS | REMOVED_KEYS
SOURCE_LISTS = (("data", "sources"), ("data", "validation"))
KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
}
BOUNDS = {
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
}


@dataclass(frozen=True)
class LoadedConfig:
    """A valid run config, and for each of its keys, dotted, what set it: `default`, `FILE:LINE`, `--set` or a flag's name."""

    config: RunConfig
    origins: dict[str, str]


def load_config(
    path: Path | str, sets: Sequence[str] = (), flags: Mapping[str, Any] | None = None, world_size: int | None = 1
) -> LoadedConfig:
    """Return the run config in the YAML or JSON file `path`, changed by `sets` ("a.b=c", c in YAML) and `flags` (key to value).

    The batch is checked for `world_size` processes; None: as many as one replica of the model takes. A DeepSpeed file named
    under `deepspeed` is read too, and its contents take the place of its path, so that the resolved config is complete.
    Raises ConfigError with all problems.
    """
    layers = _Layers(Path(path))
    for text in sets:
        layers.set_from_text(text)
    for key, value in (flags or {}).items():
        layers.set(tuple(key.split(".")), value, FLAG_OF_KEY.get(key, "flag"))
    layers.include_deepspeed_file()
    config = layers.validate(world_size)
    leaves = _leaves(config.model_dump(mode="json"), ())
    return LoadedConfig(config, {dotted(leaf): layers.origins.get(leaf, "default") for leaf in leaves})


def dump_config(config: RunConfig, origins: Mapping[str, str] | None = None) -> str:
    """Return YAML with every key of the config, which loads back to an equal one; `origins` are added as trailing comments."""
    return to_yaml(config.model_dump(mode="json"), origins)


class _Layers:
    """The values that were set so far, over the schema's defaults, with the origin of each and the problems met."""

    def __init__(self, path: Path) -> None:
        tree = read_tree(path)
        if tree.values.keys() <= DEEPSPEED_KEYS and not tree.values.keys() <= RunConfig.model_fields.keys():
            remedy = f"give it with --deepspeed_config {path}, and a run config with --config"
            raise ConfigError([f"{path}: is a DeepSpeed JSON; {remedy}"])
        self.path = path
        self.values = tree.values
        self.origins = {key: f"{path}:{line}" for key, line in tree.lines.items()}
        self.problems: list[str] = []
        self._list_single_sources()

    def set_from_text(self, text: str) -> None:
        """Apply one `--set a.b=c`."""
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            self.problems.append(f"--set {text}: must be KEY=VALUE, such as --set training.max_steps=100")
            return
        try:
            parsed = parse_value(value)
        except UserError as error:
            self.problems.append(f"--set: {key}: {value!r} is not a YAML value: {error}")
            return
        parts = key.strip().split(".")
        self.set(tuple(int(part) if part.isdecimal() and len(part) < 10 else part for part in parts), parsed, "--set")

    def set(self, path: KeyPath, value: Any, origin: str) -> None:
        """Put a value at a path, making the sections on the way to it; what stood there is replaced."""
        if isinstance(value, int) and value not in INT64:  # from a flag
            self.problems.append(f"{origin}: {dotted(path)}: got {value}, must fit in 64 bits")
            return
        holder: Any = self.values
        for depth, part in enumerate(path):
            if isinstance(part, int) and isinstance(holder, list) and part >= len(holder):
                there = f"the list has {len(holder)} (the first is 0)" if holder else "the list is empty"
                text = f"there is no item {part}; {there}; to make it longer, set {dotted(path[:depth])} as a whole"
                self.problems.append(f"{origin}: {dotted(path)}: {text}")
                if not holder:  # made on the way here
                    self._drop({path[:depth]})
                return
            fits = isinstance(holder, list if isinstance(part, int) else dict)
            if not fits:
                where = f"{dotted(path[:depth])} is {describe(holder)}, so there is nothing below it to set"
                if isinstance(holder, list) and holder:
                    first = dotted((*path[:depth], 0, *path[depth:]))
                    where = f"{dotted(path[:depth])} is a list; write {first} for its first item"
                self.problems.append(f"{origin}: {dotted(path)}: unknown key; {where}")
                return
            if depth == len(path) - 1:
                holder[part] = value
            elif isinstance(part, str) and holder.get(part) is None:
                holder[part] = (_default(path[: depth + 1]) or []) if isinstance(path[depth + 1], int) else {}
            holder = holder[part]
        self._forget({path})
        self._mark(path, value, origin)
        for keys in EXCLUSIVE:
            if path in keys and value is not None:
                self._drop({other for other in keys if _layer(self.origins.get(other, origin)) != _layer(origin)})
        self._list_single_sources()

    def include_deepspeed_file(self) -> None:
        """Replace the path of a DeepSpeed JSON file by the file's contents.

        A relative path that the run config gives is looked up beside the run config, then in the current folder; one from
        the command line the other way round.
        """
        given = self.values.get("deepspeed")
        if not isinstance(given, str):
            return
        try:
            given = from_home(given)
        except ValueError:  # validation reports it
            return
        origin = self.origins[("deepspeed",)]
        beside, current = self.path.parent / given, Path(given)
        choices = (beside, current) if origin.startswith(f"{self.path}:") else (current, beside)
        found = next((choice for choice in choices if choice.is_file()), None)
        try:
            if found is None:
                tried = " and ".join(dict.fromkeys(str(choice) for choice in choices))
                raise ConfigError([f"{origin}: deepspeed: no such file: {tried}"])
            tree = read_tree(found)
        except ConfigError as error:
            self.problems.extend(error.problems)
            self.values.pop("deepspeed")
            return
        self.values["deepspeed"] = tree.values
        self.origins |= {("deepspeed", *key): f"{found}:{line}" for key, line in tree.lines.items()}

    def validate(self, world_size: int | None) -> RunConfig:
        """Return the config. Raise ConfigError with what is wrong with single values and between those that are right."""
        wrong: set[KeyPath] = set()
        config, errors = _try(self.values)
        if config is None:
            for path, text in _merged(errors, self.values).items():
                self.problems.append(f"{self._nearest(path)}: {dotted(path)}: {text}")
                wrong.add(path)
            self._drop({_outside_lists(path) for path in wrong})
            meant = (_meant(error["loc"]) for error in errors if error["type"] == "extra_forbidden")
            wrong.update(path for path in meant if path is not None and path not in self.origins)
            config, errors = _try(self.values)
            assert config is not None, f"no problem is left after the wrong values are gone, but {errors}"
        for fault in faults_of_all_phases(config, world_size):
            keys = [tuple(int(part) if part.isdecimal() else part for part in key.split(".")) for key in fault.keys]
            # One that stands in a wrong key, or around it, may follow from that one.
            if not any(key[: len(path)] == path or path[: len(key)] == key for key in keys for path in wrong):
                self.problems.append(f"{self._nearest(keys[0])}: {fault.keys[0]}: {fault.text}")
        if self.problems:
            raise ConfigError(sorted(self.problems, key=_file_and_line))
        return config

    def _nearest(self, path: KeyPath) -> str:
        """Return what set this key, or a key in it or in the same list, or the closest section around it, or else the file."""
        tops = (path, _outside_lists(path))
        below = (origin for top in tops for key, origin in self.origins.items() if key[: len(top)] == top)
        around = (self.origins[path[:length]] for length in range(len(path), 0, -1) if path[:length] in self.origins)
        return self.origins.get(path) or next(below, None) or next(around, str(self.path))

    def _mark(self, path: KeyPath, value: Any, origin: str) -> None:
        self.origins[path] = origin
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, item in inner:
            self._mark((*path, key), item, origin)

    def _drop(self, paths: Collection[KeyPath]) -> None:
        self._forget(paths)
        for path in paths:
            holder: Any = self.values
            for part in path[:-1]:
                holder = holder[part] if holder and part in holder else None
            if isinstance(holder, dict):
                holder.pop(path[-1], None)

    def _forget(self, paths: Collection[KeyPath]) -> None:
        """Remove the origins of these keys and of all in them."""
        self.origins = {
            key: origin
            for key, origin in self.origins.items()
            if not any(key[:length] in paths for length in range(1, len(key) + 1))
        }

    def _list_single_sources(self) -> None:
        """Make one mapping where a list of sources belongs a list of one, so that paths through it are of one form."""
        for path in SOURCE_LISTS:
            section = self.values.get(path[0])
            if isinstance(section, dict) and isinstance(section.get(path[1]), dict):
                section[path[1]] = [section[path[1]]]
                below = {key: origin for key, origin in self.origins.items() if key[:2] == path and len(key) > 2}
                for key, origin in below.items():
                    del self.origins[key]
                    self.origins[(*path, 0, *key[2:])] = origin


def _file_and_line(problem: str) -> tuple[str, int]:
    place = re.match(r"(.*?)(?::(\d+))?: ", problem, re.DOTALL)
    assert place, f"a problem starts with its place: {problem}"
    return place[1], int(place[2] or 0)


def _try(values: dict[str, Any]) -> tuple[RunConfig | None, list[ErrorDetails]]:
    try:
        return RunConfig.model_validate(values), []
    except ValidationError as error:
        return None, error.errors()


def _merged(errors: list[ErrorDetails], values: Any) -> dict[KeyPath, str]:
    """Return one sentence for each wrong key, in the order of the errors. A union reports one error for each of its members."""
    texts: dict[KeyPath, list[str]] = {}
    inputs: dict[KeyPath, str] = {}
    for error in errors:
        path = _real_path(error, values)
        if error["type"] == "extra_forbidden":
            inputs[path], rule = "", _unknown_key(path)
        elif error["type"] == "missing" and isinstance(path[-1], int):
            path = path[:-1]
            default = _default(path)
            inputs[path], rule = f"got {error['input']}, ", f"a list of {len(default)}, such as the default {default}"
        elif error["type"] == "missing":
            choices = _section_of(path[:-1]).model_fields[str(path[-1])].annotation
            literals = " or ".join(repr(choice) for choice in getattr(choices, "__args__", ()))
            inputs[path], rule = "", f"is missing; must be {literals}"
        else:
            inputs[path], rule = f"got {describe(error['input'])}, ", _rule(error)
        texts.setdefault(path, []).append(rule)
    return {
        path: inputs[path] + ("must be " if inputs[path] else "") + " or ".join(dict.fromkeys(rules))
        for path, rules in texts.items()
    }


def _real_path(error: ErrorDetails, values: Any) -> KeyPath:
    """Return the location of an error without the names of union members, which pydantic appends to it."""
    if error["type"] in ("extra_forbidden", "missing"):
        return error["loc"]
    length = 0
    for part in error["loc"]:
        inside = part in values if isinstance(values, dict) else isinstance(values, list) and isinstance(part, int)
        if not inside:
            break
        values = values[part]
        length += 1
    return error["loc"][:length]


def _rule(error: ErrorDetails) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "literal_error":
        return str(context["expected"])
    if kind == "value_error":
        return str(context["error"])
    if kind in BOUNDS:
        return BOUNDS[kind].format(**context)
    if kind == "string_type" and not isinstance(error["input"], dict | list | None):
        return f'text; write "{error["input"]}"'
    if kind in ("int_type", "int_from_float") and isinstance(error["input"], float) and error["input"].is_integer():
        return f"a whole number; write {int(error['input'])}"
    assert kind in KINDS, f"the schema has a rule without words for it: {error}"
    return KINDS[kind]


def _unknown_key(path: KeyPath) -> str:
    if meant := _meant(path):
        return f"unknown key (did you mean {meant[-1]}?)"
    return f"unknown key; {dotted(path[:-1]) or 'a run config'} has {', '.join(_section_of(path[:-1]).model_fields)}"


def _meant(path: KeyPath) -> KeyPath | None:
    """Return the key of the schema that an unknown one resembles."""
    near = difflib.get_close_matches(str(path[-1]), _section_of(path[:-1]).model_fields, n=1)
    return (*path[:-1], near[0]) if near else None


def _section_of(path: KeyPath) -> type[BaseModel]:
    section: type[BaseModel] = RunConfig
    for part in path:
        if isinstance(part, str):
            inner = _classes(section.model_fields[part].annotation)
            section = next(found for found in inner if issubclass(found, BaseModel))
    return section


def _classes(annotation: Any) -> list[type]:
    inner = getattr(annotation, "__args__", None)
    if inner is None:
        return [annotation] if isinstance(annotation, type) else []
    return [found for part in inner for found in _classes(part)]


def _layer(origin: str) -> str:
    """Return what layer a key comes from: --set, any of the named flags, or a line of the file."""
    return "flags" if origin.startswith("--") and origin != "--set" else origin


def _default(path: KeyPath) -> Any:
    values: Any = RunConfig().model_dump(mode="json")
    for part in path:
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _outside_lists(path: KeyPath) -> KeyPath:
    """Return the path cut before its first list index: a list with one wrong item is left out as a whole."""
    return tuple(itertools.takewhile(lambda part: isinstance(part, str), path))


def _leaves(values: Mapping[str, Any] | list, path: KeyPath) -> list[KeyPath]:
    found: list[KeyPath] = []
    for key, value in values.items() if isinstance(values, Mapping) else enumerate(values):
        found += [(*path, key)] if is_leaf(value) else _leaves(value, (*path, key))
    return found
