"""Paths to modules, parameters and attributes below a module, as policies write them: "a.b[0].c"."""

import difflib
import functools
import re
from typing import Any

from torch import nn

_INDEX = re.compile(r"\[(\w+)\]")
_ABSENT = object()


def dotted(path: str) -> str:
    """The path as names of parameters write it: "a.b[0].c" is "a.b.0.c"."""
    return _INDEX.sub(r".\1", path)


def get(root: Any, path: str) -> Any:
    """What stands at the path. Raises AttributeError if nothing does."""
    return functools.reduce(getattr, dotted(path).split("."), root)


def first_missing(root: Any, path: str) -> str | None:
    """The shortest beginning of the path at which nothing stands, dotted; None if the whole path exists."""
    steps = dotted(path).split(".")
    for count, step in enumerate(steps, start=1):
        root = getattr(root, step, _ABSENT)
        if root is _ABSENT:
            return ".".join(steps[:count])
    return None


def split_last(path: str) -> tuple[str, str]:
    """The path of what holds the last step, "" for the root, and the last step."""
    owner, _, name = dotted(path).rpartition(".")
    return owner, name


def owner_of(root: Any, path: str) -> tuple[Any, str]:
    """What holds the last step of an existing path, and the last step."""
    owner, name = split_last(path)
    return (get(root, owner) if owner else root), name


def closest(module: nn.Module, path: str) -> str:
    """ ", did you mean ...?" for a path to a tensor that is almost one of the module's, else nothing."""
    names = [name for name, _ in module.named_parameters()]
    found = difflib.get_close_matches(dotted(path), names, n=1, cutoff=0.8)
    return f", did you mean {found[0]}?" if found else ""
