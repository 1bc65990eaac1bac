"""The files of tensors in a checkpoint: on the disk when written, and never executing anything when read.

DeepSpeed is imported in functions here and in its neighbours: its import must come after `topology.quiet`.
"""

import contextlib
import pickle
import random
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed import DistError

from ...kernels.errors import UserError, refused
from ..processes.durable_files import DurableFile, FileRecord


@contextlib.contextmanager
def file_access(
    engine: Any, *, save: Callable[[Any, str], None] | None = None, load: Callable[[str], Any] | None = None
) -> Iterator[None]:
    """Let DeepSpeed's `engine` write and read checkpoint files inside by these two functions alone.

    save: called with the contents of each file that DeepSpeed would write and the file's name. load: returns the contents of
    the file with this name in the checkpoint. DeepSpeed asks for files by name, and searches no folder for them.
    """
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    def write(state_dict: Any, path: str) -> None:
        assert save is not None, "a save, where only loading was meant"
        save(state_dict, Path(path).name)

    def read(path: str, map_location: Any = None) -> Any:
        assert load is not None, "loading, where only a save was meant"
        return load(Path(path).name)

    def names(folder: str, tag: str) -> list[str]:
        return [engine._get_ckpt_name(folder, tag, f"{rank:02d}") for rank in range(engine.mp_world_size)]

    before = engine.checkpoint_engine
    engine.checkpoint_engine = TorchCheckpointEngine()
    engine.checkpoint_engine.save, engine.checkpoint_engine.load = write, read
    engine.checkpoint_engine.makedirs = lambda path, exist_ok=False: None
    # DeepSpeed's own takes brackets and stars in the path for a pattern, and every file that fits for one of the checkpoint.
    engine._get_all_ckpt_names = names
    engine._copy_recovery_script = lambda save_path: None  # copies of DeepSpeed's scripts beside the checkpoints
    try:
        yield
    finally:
        engine.checkpoint_engine = before
        del engine._copy_recovery_script, engine._get_all_ckpt_names


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of the global generators of torch, numpy and Python, as tensors and plain values."""
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


def write_file(value: Any, path: Path) -> FileRecord:
    """`value` in a file of torch's format, on disk. Raises OSError."""
    with DurableFile(path) as file:
        try:
            torch.save(value, file)  # type: ignore[arg-type]
        except RuntimeError as error:
            # torch's writer closes its archive after a full disk, fails once more and hides the first error behind that.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
    return file.record


@contextlib.contextmanager
def understood(path: Path) -> Iterator[None]:
    """Raise UserError for what goes wrong inside with contents of `path` that are whole, but not what they should be.

    Libraries meet such contents with errors of many types, so all are taken that mean a value of another kind.
    """
    from deepspeed.runtime.zero.utils import ZeRORuntimeException

    other_kind = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
    try:
        yield
    except (UserError, torch.OutOfMemoryError, DistError):
        raise
    except (*other_kind, ZeRORuntimeException) as error:
        said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        raise UserError(f"{path} holds something else than this program writes ({said}); choose another") from error


def listed(checkpoint: Path, state: Mapping[str, Any], name: str) -> Path:
    """Return the path of a file of a checkpoint with this state.

    Raises UserError for a file that state.json does not list: only those that it lists were verified.
    """
    if name not in state["files"]:
        raise UserError(f"{checkpoint} has no file {name} among those of state.json; choose another checkpoint")
    return checkpoint / name


def read_file(path: Path, *, mapped: bool = False) -> Any:
    """Return what `write_file` or DeepSpeed wrote, on the CPU; no code in the file is executed. Raises UserError.

    mapped: tensors are read from the disk only where they are looked at.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    # All that DeepSpeed's files hold beside tensors and plain values.
    ours = torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address])
    with ours, understood(path), refused(f"cannot read {path}", "choose another checkpoint"):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            what = "is no file of tensors and plain values alone, so it is not loaded: it could run any code"
            raise UserError(f"{path} {what}; choose another checkpoint") from error
        except (RuntimeError, EOFError, struct.error) as error:
            said = str(error).splitlines()[0]
            raise UserError(f"{path} cannot be read ({said}); choose another checkpoint") from error
