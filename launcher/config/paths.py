"""What a run config names and a run would not find. No torch import."""

import re
from collections.abc import Iterator
from pathlib import Path

from ...kernels.errors import UserError
from ...recipes.config import Fault, SourceConfig
from ...recipes.data.files import find_files
from .loading import LoadedConfig
from .schema import RunConfig

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
"""What may be the id of a model or data set on the Hugging Face hub."""


def missing_paths(loaded: LoadedConfig) -> list[str]:
    """Return a line for each file or folder that the run config names and that is not there, with what set the key.

    An id of the Hugging Face hub is not looked up.
    """
    return [f"{loaded.origins[fault.keys[0]]}: {fault.keys[0]}: {fault.text}" for fault in _faults(loaded.config)]


def _faults(config: RunConfig) -> Iterator[Fault]:
    remedy = f"correct the path (the current folder is {Path.cwd()})"
    for key, path in (("tokenizer.path", config.tokenizer.path), ("load.path", config.load.path)):
        if path is not None and not Path(path).exists():
            yield Fault((key,), f"got {path!r}, which is not there; {remedy}")
    name = config.model.init_from
    if name is not None and not _may_be_there(name):
        yield Fault(("model.init_from",), f"got {name!r}, which is no folder and no id of the hub; {remedy}")
    for key, sources in (("data.sources", config.data.sources), ("data.validation", config.data.validation or [])):
        for index, source in enumerate(sources):
            if fault := _source_fault(source):
                yield Fault((f"{key}.{index}.path",), fault)


def _may_be_there(name: str) -> bool:
    return Path(name).exists() or HUB_ID.fullmatch(name) is not None


def _source_fault(source: SourceConfig) -> str | None:
    if source.kind == "builtin" or source.path is None:
        return None
    if source.kind == "hf":
        return None if _may_be_there(source.path) else f"got {source.path!r}, which is no folder and no id of the hub"
    try:
        find_files(source)
    except UserError as error:
        return str(error)
    return None
