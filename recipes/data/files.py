"""Find the files of a data source. No torch import: `config check` asks too."""

import glob
from pathlib import Path

from ...kernels.errors import UserError
from ..config import SourceConfig

_SUFFIXES = {
    "text": (".txt", ".text", ".txt.gz"),
    "jsonl": (".jsonl", ".json", ".jsonl.gz", ".json.gz"),
    "parquet": (".parquet",),
}


def find_files(source: SourceConfig) -> list[Path]:
    """Return the files of a text, jsonl or parquet source, in order of their names.

    Raises UserError if the path is none, the folder holds none of that kind, or the pattern matches none.
    """
    name, given = f"{source.kind} {source.path}", str(source.path)
    suffixes = _SUFFIXES[source.kind]
    path = Path(given)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(inner for inner in path.rglob("*") if inner.name.endswith(suffixes) and inner.is_file())
        if not found:
            raise UserError(
                f"data source {name}: the folder holds no {' or '.join(suffixes)} file; name another, or a glob"
            )
        return found
    if glob.has_magic(given):
        found = sorted(inner for inner in map(Path, glob.glob(given, recursive=True)) if inner.is_file())  # noqa: PTH207 - may be absolute
        if not found:
            raise UserError(
                f"data source {name}: no file matches this pattern below {Path.cwd()}; correct data.sources"
            )
        return found
    raise UserError(f"data source {name}: there is no such file or folder below {Path.cwd()}; correct data.sources")
