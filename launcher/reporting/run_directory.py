"""The run directory: what a run leaves behind, and whether a run may use the one it is given.

<output_dir>/<name>/ holds config.resolved.yaml (the run config in full), ds_config.json (what DeepSpeed got), env.json
(versions, machine, command), products.json (what computes its products on a CPU), tokenizer/, metrics.jsonl, tb/,
log/rank{N}.log and checkpoints/.
"""

import fcntl
import json
import logging
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from ...kernels.errors import UserError, refused
from ..config.deepspeed_keys import show
from ..config.file import ConfigError, read_tree
from ..config.loading import dump_config
from ..config.schema import RunConfig
from ..processes import console
from ..processes.durable_files import replace_text

_RECORDED_PACKAGES = (
    *("xformer-train", "torch", "deepspeed", "triton"),
    *("datasets", "tokenizers", "numpy", "transformers"),
)

_RECORDED_VARIABLES = ("NCCL_", "GLOO_", "OMP_", "CUDA_", "TORCH_", "DS_", "MASTER_", "WORLD_SIZE")


class RunDirectory:
    """Paths inside a run directory, and which keys of the run config differ from the previous start of the same run."""

    def __init__(self, root: Path, changed_keys: tuple[str, ...] = ()) -> None:
        self.root, self.changed_keys = root, changed_keys
        self.checkpoints, self.tokenizer, self.log = root / "checkpoints", root / "tokenizer", root / "log"
        self.metrics, self.config = root / "metrics.jsonl", root / "config.resolved.yaml"
        self.products = root / "products.json"
        self.lock = root / ".lock"
        """The file that a run holds locked; it is there from the first start on."""

    @staticmethod
    def of(config: RunConfig) -> "RunDirectory":
        """Return the directory of the run with this config, which may not be there."""
        return RunDirectory(Path(config.output_dir) / config.name)

    @property
    def holds_run(self) -> bool:
        """Whether a start got as far as its first step; one that failed before it may simply be tried again.

        A link to a disk that is not there counts as well.
        """
        return os.path.lexists(self.checkpoints) or os.path.lexists(self.metrics)

    @property
    def has_metrics(self) -> bool:
        """Whether a run has logged a step here."""
        return self.metrics.is_file() and self.metrics.stat().st_size > 0


def check_run_directory(config: RunConfig, *, resume: bool) -> RunDirectory:
    """Return the directory of this run, which may not be there yet.

    Raises UserError if it holds another run and `resume` is not given, or if its path is a file.
    """
    directory = RunDirectory.of(config)
    root = directory.root
    if root.exists() and not root.is_dir():
        raise UserError(f"output folder {root} is a file; choose another --output_dir or --job_name")
    if directory.holds_run and not resume:
        remedy = "continue it with --resume auto, or start another with --job_name or --output_dir"
        raise UserError(f"output folder {root} already holds a run; {remedy} (with launch, write these after --)")
    return directory


def taken_text(config: RunConfig) -> str:
    """Return why the directory of this run cannot take a new one, empty if it can."""
    try:
        check_run_directory(config, resume=False)
    except UserError as error:
        return str(error)
    return ""


def open_run_directory(config: RunConfig, held: ExitStack, *, resume: bool) -> RunDirectory:
    """Return the directory of this run as `check_run_directory` does, made if it is not there, and locked until `held` closes.

    Called by one process for all. Raises UserError also if another run holds the lock, and RefusedError if it cannot be made.
    """
    directory = check_run_directory(config, resume=resume)
    root = directory.root
    previous = None
    if directory.holds_run and directory.config.exists():
        try:
            previous = read_tree(directory.config).values
        except ConfigError as error:
            text = f"{error.problems[0]}; which keys have changed since the last start is not told"
            console.warn(text, logging.getLogger(__name__))
    with refused(f"cannot make {root}", "choose another --output_dir"):
        root.mkdir(parents=True, exist_ok=True)
    held.enter_context(only_run(directory.lock))
    if previous is None:
        return directory
    now, defaults = config.model_dump(mode="json"), RunConfig().model_dump(mode="json")
    return RunDirectory(root, tuple(_differences(previous, now, defaults)))


@contextmanager
def only_run(lock: Path) -> Iterator[None]:
    """Keep other processes out of the directory of the file `lock`, on any machine whose file system shares locks.

    Two runs in one directory would write the same checkpoints and lose each other's metrics. The system frees the lock when
    this process ends, however it ends. Without locks there is a warning. Raises UserError if another process holds the lock,
    and RefusedError if the directory cannot be written.
    """
    with refused(f"cannot write {lock}", "choose another --output_dir"):
        opened = lock.open("a+", encoding="utf-8")
    with opened as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, whose lock children inherit and may keep
        except BlockingIOError:
            file.seek(0)
            remedy = "wait for its end, or start this one with another --job_name"
            what = f"output folder {lock.parent} is in use by another run, {file.read()}; {remedy}"
            raise UserError(f"{what} (if that process is gone with its machine, remove {lock})") from None
        except OSError as error:
            why = f"{lock} cannot be locked ({error.strerror})"
            console.warn(f"{why}, so nothing keeps another run out of this directory")
        with refused(f"cannot write {lock}", "free space or choose another --output_dir"):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
        yield


def record_config(directory: RunDirectory, config: RunConfig) -> None:
    """Write config.resolved.yaml, once the run is sure to begin: a start that is refused leaves that of the run before."""
    _write(directory.config, dump_config(config))


def record_environment(directory: RunDirectory, ds_config: dict[str, Any], devices: list[str]) -> None:
    """Write ds_config.json and env.json."""
    versions: dict[str, str | None] = {}
    for package in _RECORDED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    facts = {
        "command": sys.argv,
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": versions,
        "devices": devices,
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(_RECORDED_VARIABLES)},
    }
    _write(directory.root / "ds_config.json", json.dumps(ds_config, indent=2) + "\n")
    _write(directory.root / "env.json", json.dumps(facts, indent=2) + "\n")


def log_to_file(directory: RunDirectory, rank: int) -> None:
    """Send this process's log records, with those of libraries and Python's warnings, to log/rank{N}.log."""
    path = directory.log / f"rank{rank}.log"
    with refused(f"cannot write {path}", "free space or choose another --output_dir"):
        directory.log.mkdir(parents=True, exist_ok=True)
        handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)


class _LogFile(logging.FileHandler):
    """A log that a full disk makes shorter, without a traceback on the console for each record that it does not take."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  the name is logging's
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


def _write(path: Path, text: str) -> None:
    with refused(f"cannot write {path}", "free space or choose another --output_dir"):
        replace_text(path, text)


def _differences(old: Any, new: Any, default: Any = None, path: str = "") -> list[str]:
    """Return the dotted keys whose values differ, as `key: old -> new`. A key that was not known before had its default."""
    if isinstance(old, dict) and isinstance(new, dict):
        found, defaults = [], default if isinstance(default, dict) else {}
        for key in dict.fromkeys([*old, *new]):
            usual = defaults.get(key)
            found += _differences(old.get(key, usual), new.get(key), usual, f"{path}.{key}" if path else key)
        return found
    return [] if old == new else [f"{path}: {show(old)} -> {show(new)}"]
