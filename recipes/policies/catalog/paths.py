"""Paths to modules, parameters and attributes below a module, as policies write them: "a.b[0].c", "a.b[-1].c"."""

import difflib
import re
from typing import Any

from torch import nn

_INDEX = re.compile(r"\[(-?\w+)\]")
ABSENT = object()
"""What stands where nothing does."""


def find(root: Any, path: str) -> tuple[str, Any]:
    """The path as names of parameters write it, "a.b.0.c", and what stands there.

    Where nothing does, the path ends with the first step that does not exist, at which ABSENT stands.
    """
    steps: list[str] = []
    for step in _INDEX.sub(r".\1", path).split("."):
        from_end = step.startswith("-") and hasattr(root, "__len__")
        steps.append(str(len(root) + int(step)) if from_end else step)
        root = getattr(root, steps[-1], ABSENT)
        if root is ABSENT:
            break
    return ".".join(steps), root


def owner_of(root: Any, name: str) -> tuple[Any, str]:
    """What holds the last step of an existing dotted path, and the last step."""
    owner, _, own_name = name.rpartition(".")
    return (find(root, owner)[1] if owner else root), own_name


def join(name: str, path: str) -> str:
    """The path below what stands at `name`; "" is the root."""
    return f"{name}.{path}" if name else path


def missing(module: nn.Module, path: str) -> str:
    """ "... does not exist", and of what is almost a tensor of the module, "did you mean ...?" """
    names = [name for name, _ in module.named_parameters()]
    found = difflib.get_close_matches(_INDEX.sub(r".\1", path), names, n=1, cutoff=0.8)
    return f"{path} does not exist" + (f", did you mean {found[0]}?" if found else "")
