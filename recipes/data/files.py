"""Find the files of a data source. No torch import: `config check` asks too."""

import glob
from pathlib import Path

from ...kernels.errors import UserError, refused
from ..config import SourceConfig

_SUFFIXES = {
    "text": (".txt", ".text", ".txt.gz"),
    "jsonl": (".jsonl", ".json", ".jsonl.gz", ".json.gz"),
    "parquet": (".parquet",),
}
# Compressed in ways that are not read here.
_NOT_READ = (".zst", ".zstd", ".xz", ".lzma", ".bz2", ".lz4", ".zip", ".7z", ".br", ".Z")


def find_files(source: SourceConfig) -> list[Path]:
    """Return the files of a text, jsonl or parquet source, in order of their names.

    Hidden files, and those in hidden folders, count only where a path or pattern names them. Raises UserError if the path is
    none, the folder holds none of that kind, the pattern matches none, or a file is compressed otherwise than by gzip.
    """
    name, given = f"{source.kind} {source.path}", str(source.path)
    found = _matching(name, given, _SUFFIXES[source.kind])
    for path in found:
        if path.name.endswith(_NOT_READ):
            how = "compressed in a way that is not read"
            raise UserError(f"data source {name}: {path} is {how}; unpack it, or use gzip")
    return found


def _matching(name: str, given: str, suffixes: tuple[str, ...]) -> list[Path]:
    """Return the files that a path means, which for a folder are compressed ones of its kind too. name: for messages."""
    path = Path(given)
    if path.is_file():
        return [path]
    if path.is_dir():
        with refused(f"data source {name}: the folder cannot be read", "make it readable, or correct data.sources"):
            next(path.iterdir(), None)  # which rglob passes over in silence
        endings = (*suffixes, *(suffix + packed for suffix in suffixes for packed in _NOT_READ))
        below = (inner for inner in path.rglob("*") if inner.name.endswith(endings) and inner.is_file())
        parts = {inner: inner.relative_to(path).parts for inner in below}
        found = sorted(inner for inner in parts if not any(part.startswith(".") for part in parts[inner]))
        fault = f"the folder holds no {' or '.join(suffixes)} file; name another, or a glob"
    elif glob.has_magic(given):
        matching = glob.glob(given, recursive=True)  # noqa: PTH207 - may be absolute
        found = sorted(inner for inner in map(Path, matching) if inner.is_file())
        fault = f"no file matches this pattern below {Path.cwd()}; correct data.sources"
    else:
        found, fault = [], f"there is no such file or folder below {Path.cwd()}; correct data.sources"
    if not found:
        raise UserError(f"data source {name}: {fault}")
    return found
