"""Documents of one `data.sources` entry, as strings, and what they depend on."""

import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from ...kernels.errors import UserError, refused
from ..config import SourceConfig
from .builtin_text import builtin_documents, builtin_identity
from .cache import write_atomically
from .files import find_files

READER_VERSION = 1  # raise it when the same files would give other documents

_TITLE = re.compile(r"\s*= ?[^=\s](.*[^=\s])? ?=\s*")  # `= Title =`, not `== Section ==` or `= = Section = =`
# How compressed files begin that are no text: gzip, Zstandard, xz, bzip2, zip, LZ4.
_PACKED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\0", b"BZh", b"PK\x03\x04", b"\x04\x22\x4d\x18")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass
class Read:
    """Bytes of a source's files that were read so far, compressed ones as they are on the disk."""

    amount: int = 0


@dataclass(frozen=True)
class Source:
    """An opened source.

    name: for messages; documents: starts a new pass over them, always in the same order; identity: equal if and only if the
    documents are; total: number of documents where it is known without reading them; size: bytes that a pass reads, where it
    is known and `read` counts them.
    """

    name: str
    documents: Callable[[], Iterator[str]]
    identity: str
    total: int | None = None
    size: int | None = None
    read: Read = field(default_factory=Read)


def open_source(source: SourceConfig, cache: Path) -> Source:
    """Return the documents of one source; files are found and hashed now, and read when the documents are.

    cache: folder where the hashes of files are remembered. Raises UserError, here or while documents are read, for a
    missing file, a pattern that matches none, text that is not UTF-8, a broken JSON line, a missing column or an
    unreachable dataset.
    """
    name = f"{source.kind} {source.path}" if source.path else source.kind
    if source.kind == "builtin":
        return Source(name, lambda: iter(builtin_documents()), builtin_identity())
    if source.kind == "hf":
        return _open_dataset(source, name)
    paths = find_files(source)
    if source.kind != "parquet":
        for path in paths:
            _check_name(path)
    hashes = [_content_hash(path, cache / "file_hashes") for path in paths]
    field = source.text_field
    cut_by = source.documents if source.kind == "text" else field
    identity = json.dumps([READER_VERSION, source.kind, cut_by, *hashes])
    if source.kind == "parquet":
        total = sum(_open_parquet(path, field).metadata.num_rows for path in paths)
        return Source(name, lambda: _each(paths, lambda path: _parquet_documents(path, field)), identity, total)
    read = Read()
    documents = {
        "jsonl": lambda lines, path: _jsonl_documents(lines, path, field),
        "auto": lambda lines, _: _text_documents(lines),
        "line": lambda lines, _: (document for _, line in lines for document in _joined([line])),
        "file": lambda lines, _: _joined([line for _, line in lines]),
    }["jsonl" if source.kind == "jsonl" else source.documents]
    size = sum(path.stat().st_size for path in paths)

    def each_of(path: Path) -> Iterator[str]:
        return documents(_lines(path, read), path)

    return Source(name, lambda: _each(paths, each_of), identity, size=size, read=read)


def is_held_out(document: str, fraction: float) -> bool:
    """Whether a document is in the held-out `fraction`: a matter of its text alone, so copies are on one side."""
    digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def _each(paths: list[Path], read: Callable[[Path], Iterator[str]]) -> Iterator[str]:
    for path in paths:
        yield from read(path)


def _check_name(path: Path) -> None:
    """Raise UserError if a file is compressed and its name does not say so, or the reverse: names decide how files are read."""
    with _readable(path), path.open("rb") as file:
        start = file.read(8)
    if path.suffix == ".gz":
        if start and not start.startswith(_PACKED[0]):
            raise UserError(f"{path}: damaged gzip file (it does not begin as one); fetch it again")
    elif start.startswith(_PACKED):
        remedy = "unpack it, or give gzip files names that end in .gz"
        raise UserError(f"{path}: the file is compressed, not text; {remedy}")


def _content_hash(path: Path, memory: Path) -> str:
    """Hash of the bytes of a file; not read again while its path, size and time of change stay the same."""
    status = path.stat()
    known = json.dumps([str(path.resolve()), status.st_size, status.st_mtime_ns])
    remembered = memory / hashlib.blake2b(known.encode(), digest_size=16).hexdigest()
    if remembered.is_file() and len(digest := remembered.read_text()) == 64:
        return digest
    with _readable(path), path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
    write_atomically(remembered, digest)
    return digest


class _Counted(io.FileIO):
    """A file that adds the bytes that are read from it to `read`."""

    def __init__(self, path: Path, read: Read) -> None:
        super().__init__(path)
        self._read = read

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer)
        self._read.amount += count
        return count


def _lines(path: Path, read: Read) -> Iterator[tuple[int, str]]:
    """Line numbers from 1 and lines without their end, of a UTF-8 file, gzip-compressed if its name ends so."""
    offset = 0
    with _readable(path), io.BufferedReader(_Counted(path, read), 2**16) as raw:
        file = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if path.suffix == ".gz" else raw
        for number, line in enumerate(_sound(file, path), start=1):
            try:
                text = line.removeprefix(_BYTE_ORDER_MARK if number == 1 else b"").decode()
            except UnicodeDecodeError as error:
                byte = f"byte {offset + error.start:,} of the file, 0x{line[error.start]:02x},"
                remedy = "convert the file, for example with iconv"
                raise UserError(f"{path}, line {number}: {byte} is not UTF-8; {remedy}") from None
            offset += len(line)
            yield number, text.rstrip("\r\n")


def _readable(path: Path) -> AbstractContextManager[None]:
    return refused(f"data source {path}: it cannot be read", "make it readable, or correct data.sources")


def _sound(file: BinaryIO, path: Path) -> Iterator[bytes]:
    try:
        yield from file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip file ({error}); fetch it again") from None


def _text_documents(lines: Iterator[tuple[int, str]]) -> Iterator[str]:
    """Yield documents that end at a blank line, or before a title in a file that begins with one (`= Title =`, as WikiText)."""
    document: list[str] = []
    titled: bool | None = None
    blank_before = True
    for _, line in lines:
        is_title = blank_before and _TITLE.fullmatch(line) is not None
        blank_before = not line.strip()
        if titled is None and not blank_before:
            titled = is_title
        if is_title if titled else blank_before:
            yield from _joined(document)
            document = []
        document.append(line)
    yield from _joined(document)


def _joined(lines: list[str]) -> Iterator[str]:
    text = "\n".join(lines).strip()
    if text:
        yield text


def _jsonl_documents(lines: Iterator[tuple[int, str]], path: Path, field: str) -> Iterator[str]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # an integer of 5,000 digits and brackets 1,000 deep are JSON too
            reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise UserError(f"{path}, line {number}: not JSON ({reason}); each line must be one JSON object") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: holds a {type(row).__name__}; each line must be one JSON object")
        if field not in row:
            raise _no_field(f"{path}, line {number}", field, list(row))
        yield from _checked(row[field], f"{path}, line {number}", field)


def _checked(value: Any, place: str, field: str) -> Iterator[str]:
    """The document `value`, or nothing if it is null or blank."""
    if value is None:
        return
    if not isinstance(value, str):
        raise UserError(f"{place}: {field} holds a {type(value).__name__}; data.sources text_field must name text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # a JSON string may say "\ud83d" alone
        half = f"half of a surrogate pair, U+{ord(value[error.start]):X}; correct the text or leave it out"
        raise UserError(f"{place}: character {error.start + 1:,} of {field} is {half}") from None
    if value.strip():
        yield value


def _no_field(place: str, field: str, columns: list[str]) -> UserError:
    there = ", ".join(columns) or "nothing"
    remedy = "set text_field in data.sources to the one with the text"
    return UserError(f"{place}: there is no {field}, only {there}; {remedy}")


def _open_parquet(path: Path, field: str) -> Any:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    with _readable(path), path.open("rb"):
        pass
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a parquet file ({_one_line(error)}); correct data.sources") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: damaged parquet file ({_one_line(error)}); fetch it again") from None
    if field not in file.schema_arrow.names:
        raise _no_field(str(path), field, file.schema_arrow.names)
    return file


def _parquet_documents(path: Path, field: str) -> Iterator[str]:
    import pyarrow

    with _open_parquet(path, field) as file:
        try:
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                for value in batch.column(0).to_pylist():
                    yield from _checked(value, str(path), field)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: damaged parquet file ({_one_line(error)}); fetch it again") from None


def _open_dataset(source: SourceConfig, name: str) -> Source:
    import datasets

    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False  # versions before 4 may ask to run a dataset's own program
    path = str(source.path)
    saved = Path(path, "dataset_dict.json").is_file() or Path(path, "state.json").is_file()
    try:
        if saved:
            dataset = _part_of_saved(datasets.load_from_disk(path), source)
        else:
            dataset = datasets.load_dataset(path, source.subset, split=source.split, streaming=source.streaming)
        if isinstance(dataset, datasets.IterableDataset):
            builder = datasets.load_dataset_builder(path, source.subset)
            version, total = f"{builder.hash} {builder.config_id} {source.split}", None
        else:
            version, total = dataset._fingerprint, len(dataset)
    # Not found, unreachable, unknown split or subset; files that cannot be read; a dataset that is a program.
    except (OSError, ValueError, datasets.exceptions.DatasetsError, RuntimeError) as error:
        raise _dataset_fault(name, error) from error
    columns = dataset.column_names
    if columns is not None and source.text_field not in columns:
        raise _no_field(f"data source {name}", source.text_field, columns)
    if not isinstance(dataset, datasets.IterableDataset):
        dataset = dataset.select_columns([source.text_field])

    def documents() -> Iterator[str]:
        for row in _rows(dataset, name):
            if source.text_field not in row:
                raise _no_field(f"data source {name}", source.text_field, list(row))
            yield from _checked(row[source.text_field], f"data source {name}", source.text_field)

    return Source(name, documents, json.dumps([READER_VERSION, name, source.text_field, version]), total)


def _part_of_saved(saved: Any, source: SourceConfig) -> Any:
    """Return the split, or the slice of one or several (`train[:90%]`, `train+test`), of what `save_to_disk` has written.

    Raises ValueError if there is none of that name, or a subset is asked for, which such a folder does not have.
    """
    import datasets

    if source.subset is not None:
        raise ValueError(f'A dataset from save_to_disk has no subsets, and "{source.subset}" is asked for')
    whole = str(saved.split) if isinstance(saved, datasets.Dataset) and saved.split else "train"
    splits = saved if isinstance(saved, dict) else {whole if whole.isidentifier() else "train": saved}
    if source.split in splits:
        return splits[source.split]
    try:
        wanted = datasets.ReadInstruction.from_spec(source.split)
        parts = wanted.to_absolute({name: len(split) for name, split in splits.items()})
    except (ValueError, AssertionError):  # the latter for a slice that is none
        choices = f"Should be one of {list(splits)}, or a slice of one"
        raise ValueError(f'Unknown split "{source.split}". {choices}') from None
    chosen = [splits[part.splitname].select(range(part.from_, part.to)) for part in parts]
    return chosen[0] if len(chosen) == 1 else datasets.concatenate_datasets(chosen)


def _rows(dataset: Any, name: str) -> Iterator[dict[str, Any]]:
    try:
        yield from dataset
    except Exception as error:  # of whatever reads a stream: network, gzip, Arrow, JSON
        raise _dataset_fault(name, error) from error


def _dataset_fault(name: str, error: Exception) -> UserError:
    from datasets.exceptions import DatasetGenerationError

    # That one says no more than that an error occurred.
    told = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
    return UserError(f"data source {name}: {_one_line(told)}; correct data.sources, or check the network")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")
