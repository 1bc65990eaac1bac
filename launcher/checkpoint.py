"""Checkpoints: written whole or not at all, found by id, checked before anything is loaded, never executing what they hold.

    checkpoints/step00000200/   DeepSpeed's files, rng_replica{N}.pt, state.json, copies of config and tokenizer
    checkpoints/latest          id of the newest complete checkpoint
    checkpoints/.ID.tmp/        a save in progress, or one that was interrupted

docs/resume.md is the page for users.
"""

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels.sharding import join_state_dicts
from .checkpoint_files import (
    copy_into,
    file_access,
    file_sizes,
    flush_folder,
    random_state,
    read_file,
    restore_random_state,
    write_file,
    write_text,
)
from .checkpoint_resharding import load_resharded, model_files, own_part, partitions_from, partitions_record
from .topology import Topology

LATEST = "latest"
_STATE = "state.json"
# Settings of training that stand in the model's config but change no weight: a later run may set them anew.
_FREE_MODEL_KEYS = frozenset({"hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range"})


def save(
    engine: Any,
    folder: Path,
    checkpoint_id: str,
    state: Mapping[str, Any],
    extra_files: Mapping[str, Path | str],
    topology: Topology,
) -> None:
    """Checkpoint `folder/checkpoint_id`, complete and named by `latest`, when this returns; to be called by every process.

    state: JSON values that describe the run at this point; must hold `step` (int) and `model` (the model's config).
    extra_files: name in the checkpoint -> file or folder to copy, or the text itself as a str.
    Raises ValueError if the id exists or cannot be a folder's name, and OSError, on every process, if it cannot be
    written; what was written is removed then and earlier checkpoints stay as they are.
    """
    _check_id(folder, checkpoint_id, topology)
    unfinished, pointer = folder / f".{checkpoint_id}.tmp", folder / f".{LATEST}.tmp"

    def begin() -> None:
        if topology.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            remove_unfinished(folder)
            unfinished.mkdir()
            write_text(unfinished / _STATE, "{}\n")

    def write() -> None:
        with file_access(engine) as problems:
            engine.save_checkpoint(str(folder), tag=unfinished.name, save_latest=False)
        if problems:
            raise problems[0]
        if topology.tensor_rank == 0:  # the processes of a replica draw alike
            write_file(random_state(topology.device), unfinished / f"rng_replica{topology.replica}.pt")

    def finish() -> None:
        if topology.is_main:
            for name, source in extra_files.items():
                copy_into(source, unfinished / name)
            record = {
                **state,
                "engine": _engine_facts(engine),
                "partitions": partitions_record(engine.module),
                "files": file_sizes(unfinished, leave_out=_STATE),
            }
            write_text(unfinished / _STATE, json.dumps(record, indent=1) + "\n")
            # What a full disk could refuse comes before the renames, which need no space.
            write_text(pointer, checkpoint_id + "\n")
            flush_folder(unfinished)
            unfinished.rename(folder / checkpoint_id)
            pointer.replace(folder / LATEST)
            flush_folder(folder)

    for work in (begin, write, finish):
        problem = _problem_anywhere(work, topology)
        if problem is not None:
            if topology.is_main and work is not begin:
                shutil.rmtree(unfinished, ignore_errors=True)
                pointer.unlink(missing_ok=True)
            raise OSError(
                f"checkpoint {checkpoint_id} could not be saved in {folder}: {problem}; free space there or make it writable, "
                "then resume from an earlier checkpoint, none of which was touched"
            )


def list_ids(folder: Path) -> list[str]:
    """Ids of the complete checkpoints in a `checkpoints` folder, by rising step."""
    return [name for _, name in _steps(folder)]


def resolve(path: Path, wanted_id: str) -> Path:
    """The one complete checkpoint meant by `load.path` and `load.id`.

    path: a run directory, its `checkpoints` folder, or one checkpoint. wanted_id: `latest`, an id, or a unique prefix of
    one. Raises ValueError, listing the ids there are, if none or several match.
    """
    if not path.is_dir():
        raise ValueError(
            f"load.path={path} is not a folder; give a run directory, its checkpoints folder or one checkpoint"
        )
    if (path / _STATE).is_file():
        if wanted_id == LATEST or path.name.startswith(wanted_id):
            return path
        raise ValueError(
            f"load.path={path} is the checkpoint {path.name} and load.id={wanted_id} another; give one of the two"
        )
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    ids = list_ids(folder)
    if not ids:
        raise ValueError(f"load.path={path} holds no complete checkpoint; give a run directory that does")
    known = f"checkpoints in {folder}: {', '.join(ids)}"
    if wanted_id == LATEST:
        if not (folder / LATEST).is_file():
            raise ValueError(f"load.id=latest, but the file {folder / LATEST} is missing; name one of the {known}")
        newest = (folder / LATEST).read_text(encoding="utf-8").strip()
        if newest not in ids:
            raise ValueError(
                f"load.id=latest, but {folder / LATEST} names {newest!r}, which is not there; name one of the {known}"
            )
        return folder / newest
    if wanted_id in ids:
        return folder / wanted_id
    matches = [name for name in ids if name.startswith(wanted_id)]
    if len(matches) != 1:
        found = f"fits {len(matches)} checkpoints" if matches else "fits no checkpoint"
        raise ValueError(f"load.id={wanted_id} {found}; name one of the {known}")
    return folder / matches[0]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `save` was told about the run, and what it noted itself: `engine` (zero_stage,
    world_size, tensor_parallel, precision), `partitions`, `files`.

    Raises ValueError if `checkpoint` is not a complete checkpoint.
    """
    file = checkpoint / _STATE
    if not file.is_file():
        raise ValueError(f"{checkpoint} is not a complete checkpoint: {_STATE} is missing; choose another")
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); choose another checkpoint") from error
    if not isinstance(state, dict) or not {"step", "model", "engine", "files"} <= state.keys():
        raise ValueError(f"{file} does not describe a complete checkpoint; choose another")
    return state


def check(checkpoint: Path, model: Mapping[str, Any], engine_facts: Mapping[str, Any] | None) -> dict[str, Any]:
    """`read_state(checkpoint)`, after making sure that it can be loaded into a run like this.

    model: config of the run's model. engine_facts: what `read_state` has as `engine`, of the run; None to ask for the
    weights alone. Raises ValueError for another model, unequal engine facts, missing or cut files.
    """
    state = read_state(checkpoint)
    theirs, ours = state["model"], json.loads(json.dumps(dict(model)))
    differing = [
        f"{key} is {theirs.get(key)!r} there and {ours.get(key)!r} here"
        for key in sorted((theirs.keys() | ours.keys()) - _FREE_MODEL_KEYS)
        if theirs.get(key) != ours.get(key)
    ]
    if differing:
        raise ValueError(
            f"{checkpoint} is a checkpoint of another model: {'; '.join(differing)}; choose another checkpoint"
        )
    if engine_facts is not None:
        _check_engine(checkpoint, state["engine"], engine_facts)
    for name, size in state["files"].items():
        file = checkpoint / name
        if not file.is_file():
            raise ValueError(f"{checkpoint} is damaged: {name} is missing; choose another checkpoint")
        if file.stat().st_size != size:
            raise ValueError(
                f"{checkpoint} is damaged: {name} has {file.stat().st_size} bytes instead of {size}; choose another checkpoint"
            )
    return state


def load(engine: Any, checkpoint: Path, model: Mapping[str, Any], topology: Topology) -> bool:
    """Put weights, optimizer, loss scale and random state of `checkpoint` into this process; True if the latter was possible.

    To be called by every process. The random state belongs to a replica of the model, so it is restored only in a run of as
    many replicas. Learning rate, weight decay, clipping and the like stay those of this run. model: config of the run's model.
    Raises ValueError as `check` does, and for a file that holds more than tensors and plain values.
    """
    if engine.load_universal_checkpoint():
        raise ValueError("deepspeed.checkpoint.load_universal=true reads files that could run any code; remove the key")
    state = check(checkpoint, model, _engine_facts(engine))
    optimizer = engine.basic_optimizer
    settings = [{key: group[key] for key in optimizer.defaults} for group in optimizer.param_groups]
    clipping = getattr(engine.optimizer, "clip_grad", None)
    theirs = state["engine"]
    if theirs["tensor_parallel"] == topology.tensor_parallel:
        with file_access(engine):
            engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    else:
        load_resharded(engine, checkpoint, state, topology)
    # DeepSpeed and torch bring these back from the checkpoint, which would silently undo a change in the run config.
    for group, setting in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(setting)
    if clipping is not None:
        engine.optimizer.clip_grad = clipping

    same_replicas = bool(theirs["world_size"] // theirs["tensor_parallel"] == topology.num_replicas)
    if same_replicas:
        restore_random_state(read_file(checkpoint / f"rng_replica{topology.replica}.pt"), topology.device)
    return same_replicas


def load_weights(module: torch.nn.Module, checkpoint: Path, model: Mapping[str, Any], topology: Topology) -> None:
    """Put the weights of `checkpoint` into a module that no engine holds yet, at any ZeRO stage and number of processes.

    model: config of the module. Raises ValueError as `load` does, but asks for no equal stage, processes or precision.
    """
    check(checkpoint, model, None)
    module.load_state_dict(own_part(weights(checkpoint), module, topology))


def weights(checkpoint: Path) -> dict[str, Tensor]:
    """The module's whole state dict in `checkpoint`, on the CPU, in the dtype of training; fp32 from ZeRO stage 3.

    Raises ValueError for a file that holds more than tensors and plain values.
    """
    state = read_state(checkpoint)
    if state["engine"]["zero_stage"] < 3:
        files = model_files(checkpoint, state["engine"]["tensor_parallel"])
        return join_state_dicts([file["module"] for file in files], partitions_from(state))
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    # DeepSpeed's merge of the shards unpickles anything and prints as it goes: what it is to read is proved harmless first.
    for file in checkpoint.glob("*_states.pt"):
        read_file(file)
    with contextlib.redirect_stdout(io.StringIO()):
        return dict(get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), checkpoint.name))


def prune(folder: Path, keep_last: int, never: AbstractSet[str] = frozenset()) -> list[str]:
    """Ids removed from `folder` to leave its `keep_last` newest; the one `latest` names and those in `never` always stay.

    To be called by the main process.
    """
    pointer = folder / LATEST
    kept = set(never) | ({pointer.read_text(encoding="utf-8").strip()} if pointer.is_file() else set())
    removed = [name for name in list_ids(folder)[:-keep_last] if name not in kept]
    for name in removed:
        # Renamed first: a removal that is cut short must not leave half a checkpoint under a valid id.
        shutil.rmtree((folder / name).rename(folder / f".{name}.tmp"))
    return removed


def remove_unfinished(folder: Path) -> list[str]:
    """Names of the leftovers of interrupted saves, which are removed; `save` does it too. While no save is in progress."""
    leftovers = [
        path
        for path in sorted(folder.glob(".*.tmp"))
        if path.is_dir() and ((path / _STATE).is_file() or not any(path.iterdir()))
    ]
    for path in leftovers:
        shutil.rmtree(path)
    return [path.name for path in leftovers]


def refuse_later(folder: Path, step: int) -> None:
    """Raises ValueError if `folder` holds checkpoints beyond `step`, which a run that goes on from `step` would meet again."""
    later = [name for at, name in _steps(folder) if at > step]
    if later:
        raise ValueError(
            f"{folder} holds checkpoints after step {step}, where this run begins: {', '.join(later)}; move them away, or give "
            "the run another name"
        )


def _check_id(folder: Path, checkpoint_id: str, topology: Topology) -> None:
    if checkpoint_id in {"", LATEST} or checkpoint_id != Path(checkpoint_id).name or checkpoint_id.startswith("."):
        raise ValueError(
            f"checkpoint.id_format gives the id {checkpoint_id!r}, which cannot be a folder's name; use letters, digits, - "
            "and _"
        )
    if topology.any(topology.is_main and (folder / checkpoint_id).exists()):
        raise ValueError(
            f"checkpoint {checkpoint_id} is already in {folder} and checkpoints are never overwritten; move it away, or give "
            "the run another name"
        )


def _check_engine(checkpoint: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    remedy = "set it so, or load.what=weights to start a new run from its weights"
    if theirs["precision"] != ours["precision"]:
        raise ValueError(
            f"{checkpoint} was trained in {theirs['precision']}, this run has {ours['precision']}; {remedy}"
        )
    if theirs["zero_stage"] != ours["zero_stage"]:
        raise ValueError(
            f"{checkpoint} was written at ZeRO stage {theirs['zero_stage']}, this run has stage {ours['zero_stage']}; {remedy}"
        )
    places = [f"{each['world_size']} processes, {each['tensor_parallel']} to a replica" for each in (theirs, ours)]
    if ours["zero_stage"] > 0 and places[0] != places[1]:
        raise ValueError(
            f"{checkpoint} was written at ZeRO stage {theirs['zero_stage']} by {places[0]}, each with its share of the "
            f"optimizer's state, this run has {places[1]}; start as many, or use load.what=weights"
        )


def _engine_facts(engine: Any) -> dict[str, Any]:
    import deepspeed

    precision = "fp16" if engine.fp16_enabled() else "bf16" if engine.bfloat16_enabled() else "fp32"
    return {
        "zero_stage": int(engine.zero_optimization_stage()),
        "world_size": int(engine.world_size),
        "tensor_parallel": int(engine.mp_world_size),
        "precision": precision,
        "deepspeed": deepspeed.__version__,
    }


def _steps(folder: Path) -> list[tuple[int, str]]:
    """(step, id) of the complete checkpoints in `folder`, by rising step."""
    found = [path for path in folder.glob("*") if not path.name.startswith(".") and (path / _STATE).is_file()]
    return sorted((int(read_state(path)["step"]), path.name) for path in found)


def _problem_anywhere(work: Callable[[], None], topology: Topology) -> str | None:
    """Runs `work` on every process; what the operating system refused one of them, None if nothing."""
    problem = None
    try:
        work()
    except OSError as error:
        problem = error.strerror or str(error)
    return next((each for each in topology.gather(problem) if each is not None), None)
