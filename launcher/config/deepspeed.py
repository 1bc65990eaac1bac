"""The DeepSpeed JSON of a run: what the user gave under `deepspeed`, joined with the keys that our sections own.

Our sections own the batch, the optimizer, the schedule, gradient clipping and the precision. In the user's part an equal
value is fine, "auto" is filled in, and a different value is an error, so that no number has two sources. Torch-free.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from .batch import BatchPlan
from .deepspeed_keys import MONITORS, REFUSED_KEYS, key_faults, show
from .file import ConfigError
from .optimizers import OPTIMIZER_TERMS
from .schema import Precision, RunConfig

NEVER = 2**31


def deepspeed_config(
    config: RunConfig, batch: BatchPlan, precision: Precision, origins: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return the JSON object to hand to `deepspeed.initialize`, together with our own optimizer object.

    `precision` is what `training.precision` came to on this machine; `origins` (of `LoadedConfig`) lets errors name the
    file and line. Raises ConfigError when the user's part contradicts our sections.
    """
    problems = [
        f"{(origins or {}).get(f'deepspeed.{key}', 'run config')}: deepspeed.{key}: {text}"
        for key, text in deepspeed_faults(config, batch, precision)
    ]
    if problems:
        raise ConfigError(problems)
    result = copy.deepcopy(_given(config))
    for key in ("optimizer", "fp16", "bf16", *REFUSED_KEYS, *MONITORS):
        result.pop(key, None)
    section = "bf16" if precision == "fp8" else precision
    if section != "fp32":
        result[section] = {**_section(_given(config), section), "enabled": True}
    return result | {
        "train_batch_size": batch.train_batch_size,
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": batch.gradient_accumulation_steps,
        "gradient_clipping": config.training.gradient_clipping,
        # ZeRO takes our optimizer object instead of one of its own; so does optimizer offload.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": NEVER,
    }


def deepspeed_faults(
    config: RunConfig, batch: BatchPlan | None, precision: Precision | None
) -> Iterator[tuple[str, str]]:
    """Yield pairs of a key below `deepspeed` and what is wrong with it.

    What depends on the batch or the precision is left out where that is None, which is to say not known yet.
    """
    given = _given(config)
    yield from key_faults(given)
    yield from _unchecked_faults(given)
    for key, our_key, ours in _owned(config, batch, precision):
        section, _, name = key.rpartition(".")
        theirs = _section(given, section).get(name, "auto") if section else given.get(key, "auto")
        if theirs != "auto" and not _equal(theirs, ours):
            yield key, f"got {show(theirs)}, but {our_key} is {show(ours)}; make them equal, or remove it here"
    yield from _optimizer_faults(config, _section(given, "optimizer"))
    yield from _zero_faults(config, _section(given, "zero_optimization"))


def _given(config: RunConfig) -> dict[str, Any]:
    assert not isinstance(config.deepspeed, str), "load_config puts the contents of the file in the place of its path"
    return config.deepspeed or {}


def _section(given: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """Return the mapping at a dotted path, empty where there is none."""
    for name in path.split("."):
        inner = given.get(name)
        given = inner if isinstance(inner, dict) else {}
    return given


def _owned(config: RunConfig, batch: BatchPlan | None, precision: Precision | None) -> Iterator[tuple[str, str, Any]]:
    """Yield triples of a DeepSpeed key, our key that decides it, and our value."""
    if batch is not None:
        yield "train_batch_size", "training.train_batch_size", batch.train_batch_size
        yield "train_micro_batch_size_per_gpu", "training.micro_batch_size", batch.micro_batch_size
        yield "gradient_accumulation_steps", "training.gradient_accumulation_steps", batch.gradient_accumulation_steps
    yield "gradient_clipping", "training.gradient_clipping", config.training.gradient_clipping
    if precision is not None:
        chosen = f"training.precision {config.training.precision}"
        chosen += f" (here {precision}), for which it" if config.training.precision == "auto" else ", for which it"
        yield "fp16.enabled", chosen, precision == "fp16"
        yield "bf16.enabled", chosen, precision in ("bf16", "fp8")
        if precision in ("bf16", "fp8"):
            yield "data_types.grad_accum_dtype", chosen, "fp32"
    optimizer = config.optimizer
    for name in OPTIMIZER_TERMS[optimizer.type].params:
        yield f"optimizer.params.{name}", f"optimizer.{name}", getattr(optimizer, name)


def _unchecked_faults(given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield keys that would make DeepSpeed step with a gradient that is not finite, or not that of the mean loss."""
    for section, name in (("bf16", "check_grad_overflow"), ("zero_optimization", "compute_grad_norm")):
        if _section(given, section).get(name, True) is False:
            yield f"{section}.{name}", "got false, but reliability.nan needs the norm of every gradient; remove it"
    reduction = given.get("gradient_allreduce_op", "mean")
    if reduction != "mean":
        yield "gradient_allreduce_op", f"got {show(reduction)}, but a gradient is the mean over the batch; remove it"


def _optimizer_faults(config: RunConfig, optimizer: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    ours, terms = config.optimizer.type, OPTIMIZER_TERMS[config.optimizer.type]
    theirs = optimizer.get("type", "auto")
    if theirs != "auto" and str(theirs).lower() not in terms.deepspeed_types:
        yield "optimizer.type", f"got {show(theirs)}, but optimizer.type is {ours}; make them equal, or remove it here"
    for name, value in _section(optimizer, "params").items():
        key = f"optimizer.params.{name}"
        if name == "max_grad_norm":
            yield key, f"got {show(value)}, but DeepSpeed refuses it here; set training.gradient_clipping instead"
        elif name == "adam_w_mode" and value is not True:
            yield key, f"got {show(value)}, but optimizer.type {ours} decays weights apart from the gradient; remove it"
        elif name not in (*terms.params, "adam_w_mode", "torch_adam"):
            yield key, f"is not a parameter of optimizer.type {ours}; remove it"


def _zero_faults(config: RunConfig, zero: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    stage = zero.get("stage", 0)
    optimizer = config.optimizer.type
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        yield "zero_optimization.stage", f"got {show(stage)}, must be 0, 1, 2 or 3"
    elif stage in (1, 2) and OPTIMIZER_TERMS[optimizer].needs_places and zero.get("round_robin_gradients"):
        unknown = f"it is not known which parameters a shard holds, which optimizer.type {optimizer} must know"
        yield "zero_optimization.round_robin_gradients", f"got true, but then {unknown}; set false"
    elif zero.get("zenflow") is not None:
        yield "zero_optimization.zenflow", f"is not used: optimizer.type {optimizer} steps the weights; remove it"
    elif stage == 3 and config.layer.cuda_graph:
        moved = "which moves parameters in and out of memory, but layer.cuda_graph needs them to stay"
        yield "zero_optimization.stage", f"got 3, {moved}; set stage 2 or layer.cuda_graph false"
    for name in ("offload_param", "offload_optimizer"):
        offload = _section(zero, name)
        if offload.get("device") == "nvme" and not offload.get("nvme_path"):
            yield f"zero_optimization.{name}.nvme_path", "is missing; device nvme needs a folder on such a disk"
        if offload.get("device") == "nvme" and config.training.ema_decay is not None:
            why = f"the weights of training.ema_decay {config.training.ema_decay} must stay in memory"
            yield f"zero_optimization.{name}.device", f"got 'nvme', but {why}; set cpu, or ema_decay null"


def _equal(theirs: Any, ours: Any) -> bool:
    if isinstance(ours, tuple):
        return isinstance(theirs, list | tuple) and len(theirs) == len(ours) and all(map(_equal, theirs, ours))
    if isinstance(theirs, bool) != isinstance(ours, bool):
        return False
    return bool(theirs == ours)
