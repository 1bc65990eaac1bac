"""Rules of the run config that hold between keys, or that no type can say. Torch-free.

Each rule yields faults; a fault names the keys that it read (the first is where it is reported) and says in one sentence
what was given, what is needed and what to do.
"""

import re
import string
from collections.abc import Iterator

from ...kernels.errors import UserError
from ...kernels.fp8.alignment import FP8_MULTIPLE
from ...recipes import CONFIG_CHECKS
from ...recipes.config import Fault, SourceConfig
from .batch import divisors, solve_batch
from .deepspeed import deepspeed_faults
from .deepspeed_keys import show
from .model_checks import model_faults, shared_key_head_faults
from .optimizers import optimizer_faults
from .schema import RUN_LENGTHS, LoadConfig, RunConfig, ScheduleConfig, schedule_of

PADDED_STEP = re.compile(r"(0[1-9]\d?)?d?")
# Sections of ours that decide a DeepSpeed key: a fault of one of them hides what is said about the other.
OWNERS = {
    "train_batch_size": ("training",),
    "train_micro_batch_size_per_gpu": ("training",),
    "gradient_accumulation_steps": ("training",),
    "gradient_clipping": ("training.gradient_clipping",),
    "fp16": ("training.precision",),
    "bf16": ("training.precision",),
    "optimizer": ("optimizer",),
    "zero_optimization": ("optimizer.type",),
}
KIND_WITH = {"subset": "hf", "split": "hf", "streaming": "hf", "documents": "text"}
FILE_NAME_RULE = "a plain name: no slash, no white space at its ends, no dot at its start"


def faults(config: RunConfig, world_size: int | None) -> Iterator[Fault]:
    """Yield every broken rule of a run config whose single values are all valid.

    world_size: processes of the run; None: as many as one replica of the model takes.
    """
    yield from _run_and_model_faults(config)
    yield from CONFIG_CHECKS[config.model.type](config.model, config.layer, config.data, config.objective)
    yield from _tokenizer_and_objective_faults(config)
    yield from _data_faults(config)
    yield from _schedule_faults(config)
    yield from optimizer_faults(config.optimizer)
    yield from _training_faults(config)
    yield from _parallel_faults(config, world_size)
    yield from _fp8_faults(config)
    yield from _batch_and_deepspeed_faults(config, world_size)
    yield from _checkpoint_faults(config)


def is_plain_name(name: str) -> bool:
    """Return whether `name` can be one folder or file name on every file system and is not hidden."""
    return (
        name == name.strip() != ""
        and not name.startswith(".")
        and name.isprintable()
        and not any(character in name for character in '/\\:*?"<>|')
    )


def _run_and_model_faults(config: RunConfig) -> Iterator[Fault]:
    model, data = config.model, config.data
    if not is_plain_name(config.name):
        yield Fault(("name",), f"got {config.name!r}, must be {FILE_NAME_RULE}; folders go into output_dir")
    if not config.output_dir.strip():
        yield Fault(("output_dir",), 'got an empty path, must name a folder; "." is the current one')
    yield from model_faults(model)
    if data.max_seq_length > model.max_position_embeddings:
        rule = f"must be at most model.max_position_embeddings {model.max_position_embeddings}"
        yield Fault(("data.max_seq_length", "model.max_position_embeddings"), f"got {data.max_seq_length}, {rule}")
    if config.layer.cuda_graph and config.layer.unpad:
        why = "without padding every batch has another number of tokens, and a graph has one"
        yield Fault(("layer.cuda_graph", "layer.unpad"), f"got true, but {why}; set either to false")


def _tokenizer_and_objective_faults(config: RunConfig) -> Iterator[Fault]:
    model, tokenizer, objective = config.model, config.tokenizer, config.objective
    most = objective.max_predictions_per_seq
    if (most or 0) > config.data.max_seq_length:
        keys = ("objective.max_predictions_per_seq", "data.max_seq_length")
        yield Fault(keys, f"got {most}, must be at most data.max_seq_length {config.data.max_seq_length}")
    if tokenizer.path is not None and tokenizer.type != "auto":
        why = f"the type of tokenizer.path {tokenizer.path!r} is read from that file"
        remedy = "set auto, or remove tokenizer.path to train a new tokenizer"
        yield Fault(("tokenizer.type", "tokenizer.path"), f"got {tokenizer.type!r}, but {why}; {remedy}")
    if model.init_from is not None and tokenizer.type != "auto":
        why = "the tokenizer of model.init_from is used, to which its weights belong"
        yield Fault(("tokenizer.type", "model.init_from"), f"got {tokenizer.type!r}, but {why}; set auto")
    if tokenizer.type == "bytes" and isinstance(model.vocab_size, int) and model.vocab_size < 256:
        text = f"got {model.vocab_size}, but tokenizer.type bytes has 256 symbols; set 256 or more, or auto"
        yield Fault(("model.vocab_size", "tokenizer.type"), text)


def _data_faults(config: RunConfig) -> Iterator[Fault]:
    data = config.data
    for key, sources in (("data.sources", data.sources), ("data.validation", data.validation)):
        for index, source in enumerate(sources or []):
            for name, text in _source_faults(source):
                yield Fault((f"{key}.{index}.{name}", f"{key}.{index}.kind"), text)
        unweighted = [index for index, source in enumerate(sources or []) if source.weight is None]
        if unweighted and len(unweighted) < len(sources or []):
            text = f"is missing, though other sources have one; give all sources of {key} a weight, or none"
            yield Fault((f"{key}.{unweighted[0]}.weight",), text)
    if data.validation is not None and not data.validation:
        yield Fault(("data.validation",), "is an empty list; give a source, or null for none")
    if data.validation and data.validation_fraction:
        text = f"got {data.validation_fraction}, but data.validation already gives held-out text; keep one of the two"
        yield Fault(("data.validation_fraction", "data.validation"), text)
    if config.eval.every_steps and not data.validation and not data.validation_fraction:
        why = "there is no held-out data; set data.validation_fraction or data.validation"
        keys = ("eval.every_steps", "data.validation", "data.validation_fraction")
        yield Fault(keys, f"got {config.eval.every_steps}, but {why}")


def _source_faults(source: SourceConfig) -> Iterator[tuple[str, str]]:
    if source.kind == "builtin" and source.path is not None:
        yield "path", f"got {source.path!r}, but kind builtin is read from the Python interpreter; remove path"
    if source.kind != "builtin" and not source.path:
        what = "the name or folder of a dataset" if source.kind == "hf" else "a file, folder or glob"
        yield "path", f"is missing; kind {source.kind} needs {what}"
    if source.kind in ("builtin", "text") and source.text_field != "text":
        yield "text_field", f"got {source.text_field!r}, but kind {source.kind} has no fields; remove it"
    given = source.model_dump(exclude_defaults=True)
    for name, owner in KIND_WITH.items():
        if source.kind != owner and name in given:
            only = f"only kind {owner} has it, and this source is kind {source.kind}"
            yield name, f"got {show(given[name])}, but {only}; remove it"


def _schedule_faults(config: RunConfig) -> Iterator[Fault]:
    given, max_steps = config.schedule, config.training.max_steps
    if given.warmup_steps is not None and given.warmup_proportion is not None:
        text = f"got {given.warmup_proportion}, but schedule.warmup_steps {given.warmup_steps} is given too"
        yield Fault(("schedule.warmup_proportion", "schedule.warmup_steps"), f"{text}; keep one of the two")
    yield from _min_lr_faults(given, config.optimizer.lr)
    schedule = schedule_of(config)
    if config.training.max_hours is not None:
        yield from _steps_in_time_faults(schedule, config.training.max_hours)
    total = schedule.total_steps or max_steps
    total_key = "training.max_steps" if schedule.total_steps is None else "schedule.total_steps"
    if total is not None and (schedule.warmup_steps or 0) > total:
        keys = ("schedule.warmup_steps", "schedule.total_steps", "training.max_steps")
        yield Fault(keys, f"got {schedule.warmup_steps}, must be at most {total_key} {total}")
    if schedule.type == "wsd":
        warmup = schedule.warmup_proportion or 0.0
        if schedule.warmup_steps is not None and total is not None:
            warmup = schedule.warmup_steps / total
        if warmup <= 1 < warmup + schedule.decay_proportion - 1e-9:
            keys = ("schedule.decay_proportion", "schedule.warmup_proportion", "schedule.warmup_steps")
            why = f"which with a warm-up of {warmup:.4g} is more than the whole schedule"
            yield Fault(keys, f"got {schedule.decay_proportion}, {why}; must be at most {1 - warmup:.4g}")
    elif schedule.decay != "linear":
        text = f"got {schedule.decay!r}, but only schedule.type wsd has a decay of two shapes; remove it"
        yield Fault(("schedule.decay", "schedule.type"), text)
    ends_at_zero = schedule.type in ("EP", "linear", "cosine", "wsd") and schedule.lr_offset == schedule.min_lr == 0
    if ends_at_zero and schedule.total_steps and max_steps and max_steps > schedule.total_steps:
        keys = ("schedule.total_steps", "training.max_steps", "schedule.type")
        why = f"the run goes on to training.max_steps {max_steps}, and schedule.type {schedule.type} ends at lr 0"
        yield Fault(keys, f"got {schedule.total_steps}, but {why}; set {max_steps} or null")


def _steps_in_time_faults(schedule: ScheduleConfig, max_hours: float) -> Iterator[Fault]:
    """Yield what is given in steps to a schedule that follows the time of a run."""
    why = f"with training.max_hours {max_hours:g} the schedule follows the time, and counts no steps"
    remedies = {"warmup_steps": "give schedule.warmup_proportion", "total_steps": "remove it"}
    for name, remedy in remedies.items():
        if value := getattr(schedule, name):
            yield Fault((f"schedule.{name}", "training.max_hours"), f"got {value}, but {why}; {remedy}")
    if schedule.type in ("EE", "LE"):
        text = f"got {schedule.type!r}, which decays by schedule.decay_steps, but {why}; set EP, linear, cosine, or wsd"
        yield Fault(("schedule.type", "training.max_hours"), text)


def _min_lr_faults(schedule: ScheduleConfig, lr: float) -> Iterator[Fault]:
    key, least = "schedule.min_lr", schedule.min_lr
    if least > lr:
        yield Fault(
            (key, "optimizer.lr"), f"got {least:g}, must be at most optimizer.lr {lr:g}, from which lr falls to it"
        )
    if least and schedule.lr_offset:
        why = f"schedule.lr_offset {schedule.lr_offset:g} is added to lr at every step, so lr would not end there"
        yield Fault((key, "schedule.lr_offset"), f"got {least:g}, but {why}; keep one of the two")
    if least and schedule.type == "constant":
        yield Fault((key, "schedule.type"), f"got {least:g}, but schedule.type constant does not fall; remove it")


def _training_faults(config: RunConfig) -> Iterator[Fault]:
    training = config.training
    if training.activation_checkpointing == "full" and config.layer.cuda_graph:
        why = "a graph of layer.cuda_graph holds the memory of all that it computes"
        remedy = "set selective or none, or layer.cuda_graph false"
        yield Fault(("training.activation_checkpointing", "layer.cuda_graph"), f"got full, but {why}; {remedy}")
    lengths = {f"training.{name}": getattr(training, name) for name in RUN_LENGTHS}
    given = [key for key, value in lengths.items() if value is not None]
    if not given:
        yield Fault(tuple(lengths), f"is missing; give the length of the run as one of {', '.join(lengths)}")
    for key in given[1:]:
        why = f"{given[0]} {lengths[given[0]]} is given too, and a run has one length"
        yield Fault((key, given[0]), f"got {lengths[key]}, but {why}; keep one of the two")


def _parallel_faults(config: RunConfig, world_size: int | None) -> Iterator[Fault]:
    tensor, key, model = config.parallel.tensor, "parallel.tensor", config.model
    if (world_size or tensor) % tensor:
        processes = f"{world_size} {'process' if world_size == 1 else 'processes'}"
        text = f"got {tensor}, which does not divide the {processes} of the run; start a multiple of {tensor}"
        yield Fault((key,), text)
    shared = {
        "model.num_attention_heads": model.num_attention_heads,
        "model.intermediate_size": model.intermediate_size,
    }
    if model.vocab_size != "auto":
        shared["model.vocab_size"] = model.vocab_size
    if config.parallel.sequence:
        shared["data.max_seq_length"] = config.data.max_seq_length
    for name, size in shared.items():
        if size % tensor:
            found = divisors(size)
            listed = ", ".join([*map(str, found[:8]), *(["..."] if len(found) > 8 else [])])
            yield Fault((key, name), f"got {tensor}, must divide {name} {size}: {listed}")
    yield from shared_key_head_faults(model, tensor)
    if tensor > 1 and config.layer.cuda_graph:
        text = f"got true, but a graph cannot hold what the {tensor} processes of {key} send each other; set false"
        yield Fault(("layer.cuda_graph", key), text)
    if not config.parallel.sequence:
        return
    if tensor == 1:
        why = "it divides tokens over the processes of parallel.tensor, which is 1"
        yield Fault(("parallel.sequence", key), f"got true, but {why}; set false, or parallel.tensor")
    if config.layer.unpad:
        why = "with layer.unpad the number of tokens changes from batch to batch"
        text = f"got true, but {why}, and the processes cannot always share it equally; set either to false"
        yield Fault(("parallel.sequence", "layer.unpad"), text)


def _fp8_faults(config: RunConfig) -> Iterator[Fault]:
    if config.training.precision != "fp8":
        return
    model, tensor = config.model, config.parallel.tensor
    on_each = "" if tensor == 1 else f" times parallel.tensor {tensor}"
    need = f"the matrix products of training.precision fp8 need a multiple of {FP8_MULTIPLE}{on_each}"
    keys = ("training.precision", "parallel.tensor")
    for name, size in (("model.hidden_size", model.hidden_size), ("model.intermediate_size", model.intermediate_size)):
        if size % (FP8_MULTIPLE * tensor):
            yield Fault((name, *keys), f"got {size}, but {need}")
    queries, keys_and_values = (
        heads * model.head_size for heads in (model.num_attention_heads, 2 * max(1, model.key_heads // tensor))
    )
    if model.head_dim is not None and queries % (FP8_MULTIPLE * tensor):
        what = f"which makes {queries} columns of all model.num_attention_heads {model.num_attention_heads}"
        yield Fault(("model.head_dim", "model.num_attention_heads", *keys), f"got {model.head_dim}, {what}, but {need}")
    elif model.num_key_value_heads is not None and keys_and_values % FP8_MULTIPLE:
        what = f"which with heads of {model.head_size} columns makes {keys_and_values} of keys and values in a process"
        need = need.removesuffix(on_each)
        yield Fault(("model.num_key_value_heads", *keys), f"got {model.key_heads}, {what}, but {need}")
    for flag in ("normalize_invertible", "gelu_checkpoint"):
        if getattr(config.layer, flag):
            why = "saves nothing with training.precision fp8, which keeps one byte of each number"
            yield Fault((f"layer.{flag}", "training.precision"), f"got true, but {why}; set false")


def _batch_and_deepspeed_faults(config: RunConfig, world_size: int | None) -> Iterator[Fault]:
    keys = ("training.train_batch_size", "training.micro_batch_size", "training.gradient_accumulation_steps")
    batch = None
    try:
        batch = solve_batch(config.training, num_replicas(config, world_size))
    except UserError as error:
        yield Fault(keys, str(error).removeprefix(f"{keys[0]}: "))
    precision = config.training.precision
    for key, text in deepspeed_faults(config, batch, None if precision == "auto" else precision):
        yield Fault((f"deepspeed.{key}", *OWNERS.get(key.split(".")[0], ())), text)


def num_replicas(config: RunConfig, world_size: int | None) -> int:
    """Return the number of replicas of the model among the processes of a run, at least 1. world_size: as in `faults`."""
    return max(1, (world_size or config.parallel.tensor) // config.parallel.tensor)


def _checkpoint_faults(config: RunConfig) -> Iterator[Fault]:
    if text := _id_format_fault(config.checkpoint.id_format):
        yield Fault(("checkpoint.id_format",), f"got {config.checkpoint.id_format!r}, {text}")
    load = config.load
    if load.path is not None and config.model.init_from is not None:
        text = f"got {config.model.init_from!r}, but load.path {load.path!r} gives the weights too; keep one of the two"
        yield Fault(("model.init_from", "load.path"), text)
    if load.path is None:
        for name, value in load.model_dump(exclude_defaults=True).items():
            text = f"got {show(value)}, but load.path does not say where to load from; set it"
            yield Fault((f"load.{name}", "load.path"), text)
    else:
        yield from _clock_faults(load, config.schedule)
    if config.reliability.nan == "rollback" and config.checkpoint.save_every_steps is None:
        why = "without checkpoint.save_every_steps there is no checkpoint to go back to"
        keys = ("reliability.nan", "checkpoint.save_every_steps")
        yield Fault(keys, f"got 'rollback', but {why}; set it, or skip")


def _clock_faults(load: LoadConfig, schedule: ScheduleConfig) -> Iterator[Fault]:
    for name in ("rewarmup", "decay"):
        if getattr(load, name) and load.what == "weights":
            text = "got true, but load.what weights starts a new run, whose schedule starts at step 0 anyway; set false"
            yield Fault((f"load.{name}", "load.what"), text)
    if load.decay and load.rewarmup:
        text = "got true, but load.rewarmup begins the whole schedule at the loaded step; keep one of the two"
        yield Fault(("load.decay", "load.rewarmup"), text)
    if load.decay and schedule.type != "wsd":
        why = f"schedule.type {schedule.type} has no decay of its own to begin"
        yield Fault(("load.decay", "schedule.type"), f"got true, but {why}; set schedule.type wsd, or load.rewarmup")


def _id_format_fault(id_format: str) -> str | None:
    try:
        fields = [field for field in string.Formatter().parse(id_format) if field[1] is not None]
    except ValueError as error:
        return f"is not a format: {error}"
    for _, name, padding, conversion in fields:
        if name not in ("step", "epoch") or conversion is not None:
            return f"may hold {{step}} and {{epoch}} only, not {{{name}{'!' + conversion if conversion else ''}}}"
        if not PADDED_STEP.fullmatch(padding or ""):
            return f"has {{{name}:{padding}}}; only zero padding is allowed, such as {{{name}:08d}}"
    if "step" not in {name for _, name, _, _ in fields}:
        return "must hold {step}, so that no two checkpoints have one name; {step:08d} sorts by step"
    if not is_plain_name(id_format.format(step=1, epoch=1)):
        return f"must give {FILE_NAME_RULE}"
    return None
