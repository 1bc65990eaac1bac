"""The files in a checkpoint: flushed to disk when written, and never executing anything when read.

DeepSpeed is imported in functions here and in its neighbours: its import must come after `topology.quiet`.
"""

import contextlib
import os
import pickle
import random
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch


@contextlib.contextmanager
def file_access(engine: Any) -> Iterator[list[OSError]]:
    """Within, DeepSpeed's `engine` writes its checkpoint files through to the disk and reads them without executing code.

    Gives the list of failed writes, to be looked at afterwards. They are not raised at once: DeepSpeed ends a save with a
    barrier, and a process that left early would leave the others waiting there.
    """
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    problems: list[OSError] = []

    def save(state_dict: Any, path: str) -> None:
        try:
            write_file(state_dict, Path(path))
        except OSError as error:
            problems.append(error)

    def load(path: str, map_location: Any = None) -> Any:
        return read_file(Path(path))

    before = engine.checkpoint_engine
    engine.checkpoint_engine = TorchCheckpointEngine()
    engine.checkpoint_engine.save, engine.checkpoint_engine.load = save, load
    # Copies of DeepSpeed's scripts beside the checkpoints: unneeded, and a full disk would make the main process leave here.
    engine._copy_recovery_script = lambda save_path: None
    try:
        yield problems
    finally:
        engine.checkpoint_engine = before
        del engine._copy_recovery_script


def random_state(device: torch.device) -> dict[str, Any]:
    """State of the global generators of torch, numpy and Python, as tensors and plain values."""
    legacy = np.random.get_state(legacy=False)
    keys = torch.from_numpy(legacy["state"]["key"].astype(np.int64))
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": {**legacy, "state": {"key": keys, "pos": int(legacy["state"]["pos"])}},
        "python": random.getstate(),
    }


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Make the generators go on from what `random_state` noted."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    legacy = state["numpy"]
    keys = legacy["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**legacy, "state": {"key": keys, "pos": legacy["state"]["pos"]}})
    random.setstate(state["python"])


def write_file(value: Any, path: Path) -> None:
    """`value` in a file of torch's format, on disk. Raises OSError."""
    with path.open("wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:
            # torch's writer closes its archive after a full disk, fails once more and hides the first error behind that.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        file.flush()
        os.fsync(file.fileno())


def read_file(path: Path) -> Any:
    """What `write_file` or DeepSpeed wrote, on the CPU; no code in the file is executed. Raises ValueError."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    # All that DeepSpeed's files hold beside tensors and plain values.
    with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} is no file of tensors and plain values alone, so it is not loaded: it could run any code; choose "
                "another checkpoint"
            ) from error
        except (RuntimeError, EOFError) as error:
            raise ValueError(
                f"{path} cannot be read ({str(error).splitlines()[0]}); choose another checkpoint"
            ) from error


def write_text(path: Path, text: str) -> None:
    """`text` in a file, on disk."""
    path.write_text(text, encoding="utf-8")
    _flush(path)


def copy_into(source: Path | str, target: Path) -> None:
    """A copy of a file or folder, or the text itself if `source` is a str, on disk at `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(source, str):
        target.write_text(source, encoding="utf-8")
    elif source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)
    for path in [target] if target.is_file() else [p for p in target.rglob("*") if p.is_file()]:
        _flush(path)


def file_sizes(folder: Path, leave_out: str) -> dict[str, int]:
    """Bytes of each file in `folder` and below, by relative name, but for the file named `leave_out`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / leave_out)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Make new names in `folder` survive a power cut; Windows has no such call."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
