"""Checkpoints brought into a run: verified before anything is loaded, never executing what they hold.

saving.py makes them, store.py finds them; docs/resume.md is the page for users.
"""

import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...kernels.errors import UserError
from ...recipes.config import FREE_MODEL_KEYS, ModelConfig
from ..config.schema import Precision
from ..optim.ema import EMA
from ..processes.topology import Topology
from .files import file_access, listed, read_file, restore_random_state, understood
from .resharding import Saved, load_resharded, own_part
from .saving import engine_facts
from .store import damage, not_verified, read_state, refuse_damaged

# What a model has by keys that its run config did not know yet. Not vocab_size: a checkpoint says how many rows there are.
_MODEL_DEFAULTS = ModelConfig().model_dump(mode="json", exclude={"vocab_size"})


def check(checkpoint: Path, model: Mapping[str, Any], precision: Precision | None) -> dict[str, Any]:
    """`read_state(checkpoint)`, after making sure that it can be loaded into a run like this.

    model: config of the run's model. precision: what the run trains in; None to ask for the weights alone.
    Raises UserError for another model, another precision, missing, cut or changed files.
    """
    state = read_state(checkpoint)
    theirs, ours = (_MODEL_DEFAULTS | known for known in (state["model"], json.loads(json.dumps(dict(model)))))
    differing = [
        f"{key} is {theirs.get(key)!r} there and {ours.get(key)!r} here"
        for key in sorted((theirs.keys() | ours.keys()) - FREE_MODEL_KEYS)
        if theirs.get(key) != ours.get(key)
    ]
    if differing:
        what = "; ".join(differing)
        raise UserError(f"{checkpoint} is a checkpoint of another model: {what}; choose another checkpoint")
    trained_in, stored_as = state["engine"]["precision"], "bf16" if precision == "fp8" else precision
    if precision is not None and trained_in != stored_as:
        remedy = "set it so, or load.what=weights to start a new run from its weights"
        raise UserError(f"{checkpoint} was trained in {trained_in}, this run has {precision}; {remedy}")
    files = state["files"]
    refuse_damaged(checkpoint, damage(checkpoint, files, contents=False))
    refuse_damaged(checkpoint, damage(checkpoint, not_verified(checkpoint, files)))
    return state


def check_optimizer(checkpoint: Path, moments: Set[str], kind: str) -> None:
    """Raise UserError if an optimizer of this kind, which keeps these moments, cannot go on from a verified checkpoint."""
    with understood(checkpoint):
        theirs = Saved(checkpoint, read_state(checkpoint)).moments()
    if theirs and theirs != moments:
        kept, keeps = (", ".join(sorted(names)) or "nothing" for names in (theirs, moments))
        what = f"{checkpoint} was trained by another optimizer, which kept {kept} of its parameters"
        remedy = "set that of the checkpoint, or load.what=weights to start a new run from its weights"
        raise UserError(f"{what}; optimizer.type={kind} keeps {keeps}: {remedy}")


class _EqualSizes(TorchFunctionMode):
    """Raise ValueError where a tensor is copied to one of another size: torch would spread one element over it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.copy_ and args[0].numel() != args[1].numel():
            raise ValueError(f"{args[1].numel()} elements where {args[0].numel()} are needed")
        return func(*args, **kwargs or {})


def load(engine: Any, checkpoint: Path, model: Mapping[str, Any], topology: Topology) -> bool:
    """Put weights, optimizer, loss scale and random state of `checkpoint` into this process; True if the latter was possible.

    To be called by every process. The random state belongs to a replica of the model, so it is restored only in a run of as
    many replicas. Learning rate, weight decay, clipping and the like stay those of this run. model: config of the run's model.
    With the ZeRO stage, the replicas and the tensor-parallel size of the checkpoint DeepSpeed reads its own files; with others
    weights and moments are put together and divided anew, without a change of a bit.
    Raises UserError as `check` does, and for a file that holds more than tensors and plain values.
    """
    if engine.load_universal_checkpoint():
        raise UserError("deepspeed.checkpoint.load_universal=true reads files that could run any code; remove the key")
    ours = engine_facts(engine)
    state = check(checkpoint, model, ours["precision"])
    theirs = state["engine"]
    optimizer = engine.basic_optimizer
    # A load gives `optimizer.defaults` a key that no group has, and a run loads again when it goes back.
    settings = [{key: group[key] for key in group.keys() & optimizer.defaults} for group in optimizer.param_groups]
    clipping = getattr(engine.optimizer, "clip_grad", None)
    with understood(checkpoint), _EqualSizes():
        if all(theirs[fact] == ours[fact] for fact in ("zero_stage", "world_size", "tensor_parallel")):
            with file_access(engine, load=lambda name: read_file(listed(checkpoint, state, name))):
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
        own = listed(checkpoint, state, f"rng_replica{topology.replica}.pt")
        with understood(own):
            restore_random_state(read_file(own), topology.device)
    return same_replicas


def load_weights(module: torch.nn.Module, checkpoint: Path, model: Mapping[str, Any], topology: Topology) -> None:
    """Put the weights of `checkpoint` into a module that no engine holds yet, at any ZeRO stage and number of processes.

    model: config of the module. Raises UserError as `load` does, but asks for no equal stage, processes or precision.
    """
    check(checkpoint, model, None)
    with understood(checkpoint):
        module.load_state_dict(own_part(weights(checkpoint), module, topology))


def weights(checkpoint: Path, *, ema: bool = False) -> dict[str, Tensor]:
    """Return the module's whole state dict in `checkpoint`, on the CPU, in fp32: in other precisions what the optimizer steps.

    ema: the mean of the weights in their place, which of one that was never stepped is itself.
    Raises UserError for a file that holds more than tensors and plain values, and if there is no mean that is asked for.
    """
    with understood(checkpoint):
        saved = Saved(checkpoint, read_state(checkpoint))
        means = {name for name in saved.names if ema and EMA in saved.state(name)}
        if ema and not means:
            remedy = "leave --ema out, or train with training.ema_decay"
            raise UserError(f"{checkpoint} holds no mean of the weights, for which --ema asks; {remedy}")
        return {name: saved.whole(name, EMA if name in means else "weight") for name in saved.names}
