"""What a run says about itself when it starts and when it ends."""

import shlex
import textwrap
from dataclasses import dataclass

from ...recipes import RECIPES
from ...recipes.data.run_tokenizer import RunTokenizer
from ...recipes.data.stream import PreparedData
from ..config.batch import BatchPlan
from ..config.optimizers import OPTIMIZER_TERMS, OptimizerConfig
from ..config.schema import CheckpointConfig, RunConfig, ScheduleConfig
from ..optim.optimizer import OPTIMIZERS
from ..optim.schedule import warmup_length
from ..processes.words import duration, number
from .run_directory import RunDirectory


@dataclass(frozen=True)
class StartupFacts:
    """What the start-up report says; counts are over all processes."""

    config: RunConfig
    batch: BatchPlan
    data: PreparedData
    tokenizer: RunTokenizer
    num_parameters: int
    num_parameters_without_embeddings: int
    precision: str
    """The precision and why it was chosen, such as "bf16: the GPU has it"."""
    kernels: str
    """Which path computes the layers, such as "Triton (CUDA device)"."""
    devices: str
    """Such as "2 x NVIDIA H200" or "CPU, 2 threads"."""
    zero_stage: int
    start_step: int
    max_steps: int
    schedule_steps: int
    start: str
    """Where the run starts and what it takes, such as "new weights" or "runs/a/checkpoints/step00000100 (weights only)"."""


@dataclass(frozen=True)
class ClosingFacts:
    """What the closing summary says beside the run config."""

    step: int
    max_steps: int
    steps_now: int
    """Steps of this start, without those before a resume; likewise samples_now."""
    samples: int
    samples_now: int
    training_time_s: float
    """Time spent in steps."""
    wall_time_s: float
    """Time since the start of the process, evaluation and checkpoints included."""
    best: tuple[float, int] | None
    """The lowest validation loss and its step; None if there was no evaluation."""
    checkpoint_id: str
    """The last complete checkpoint; empty if there is none."""
    resume_command: str


def startup_report(facts: StartupFacts) -> str:
    """Return the start-up report: a title and aligned lines, without a newline at the end."""
    config, model = facts.config, facts.config.model
    lines = [
        (
            "model",
            f"{model.type}: {_counted(model.num_hidden_layers, 'layer')}, hidden size {model.hidden_size:,}, "
            f"{_millions(facts.num_parameters)} parameters "
            f"({_millions(facts.num_parameters_without_embeddings)} without embeddings)",
        ),
        ("batch", f"{_batch_text(facts)}, each up to {config.data.max_seq_length:,} tokens"),
        ("precision", facts.precision),
        ("kernels", facts.kernels),
        ("devices", facts.devices),
        *_parallel_line(config),
        ("ZeRO", f"stage {facts.zero_stage}"),
        ("data", _data_text(facts.data)),
        *_shares_line(config, facts.data),
        ("tokenizer", f"{facts.tokenizer.kind}, {facts.tokenizer.vocab_size:,} symbols"),
        ("steps", _steps_text(facts)),
        ("optimizer", _optimizer_text(config.optimizer)),
        ("schedule", _schedule_text(config.schedule, facts.schedule_steps)),
        ("saves", _checkpoint_text(config.checkpoint)),
        *_evaluation_line(config, facts.data),
        ("start", f"from {facts.start}"),
        ("output", str(RunDirectory.of(config).root)),
    ]
    return _aligned(f"run {config.name}", lines, text_width=88)


def _batch_text(facts: StartupFacts) -> str:
    replica, replicas = ("process", "processes") if facts.config.parallel.tensor == 1 else ("replica", "replicas")
    return (
        f"{facts.batch.train_batch_size:,} sequences = {facts.batch.micro_batch_size:,} per {replica}"
        f" x {_counted(facts.batch.num_replicas, replica, replicas)}"
        f" x {_counted(facts.batch.gradient_accumulation_steps, 'micro-batch', 'micro-batches')}"
    )


def _parallel_line(config: RunConfig) -> list[tuple[str, str]]:
    if config.parallel.tensor == 1:
        return []
    shared = "layers, embedding, head and tokens" if config.parallel.sequence else "layers, embedding and head"
    return [("parallel", f"{config.parallel.tensor} processes share the {shared} of a replica")]


def closing_summary(config: RunConfig, facts: ClosingFacts) -> str:
    """Return the closing summary: a title and aligned lines, without a newline at the end."""
    speed = number(facts.samples_now / facts.training_time_s) if facts.training_time_s > 0 else "n/a"
    since_start = f" ({facts.steps_now:,} since this start)" if facts.steps_now != facts.step else ""
    lines = [
        ("steps", f"{facts.step:,} of {facts.max_steps:,}{since_start}"),
        ("samples", f"{facts.samples:,}"),
        ("time", f"{duration(facts.wall_time_s)}, {duration(facts.training_time_s)} of it in steps"),
        ("speed", f"{speed} sequences/s on average"),
        *([("held-out", "best loss {:.4f} at step {:,}".format(*facts.best))] if facts.best else []),
        ("checkpoint", facts.checkpoint_id or "none"),
        ("output", str(RunDirectory.of(config).root)),
    ]
    if facts.step == facts.max_steps:
        return _aligned(f"run {config.name} finished", lines + _what_to_try(config))
    resume = [("to resume", facts.resume_command)] if facts.checkpoint_id else []
    return _aligned(f"run {config.name} stopped as asked", lines + resume)


def _what_to_try(config: RunConfig) -> list[tuple[str, str]]:
    """Return the commands that show what a finished run has made."""
    root = shlex.quote(str(RunDirectory.of(config).root))
    command = RECIPES[config.model.type].command
    ask = f"{command} --run {root} " + {"sample": '--prompt "Once"', "fill-mask": '"a [MASK]"'}[command]
    plot = [("to plot", f"tensorboard --logdir {root}")] if config.logging.tensorboard else []
    return [("to try", f"xformer-train {ask}"), ("to export", f"xformer-train export --run {root} --to DIR"), *plot]


def _data_text(data: PreparedData) -> str:
    held_out = "none" if data.validation is None else f"{data.validation.num_samples:,} samples"
    return (
        f"{data.sizes.documents:,} documents, {data.sizes.tokens:,} tokens, {data.train.num_samples:,} samples per epoch, "
        f"{held_out} held out"
    )


def _steps_text(facts: StartupFacts) -> str:
    done = f", {facts.start_step:,} of them done" if facts.start_step else ""
    # The steps that are done may have been on other data, so epochs are those of the steps to come.
    steps_to_go = max(0, facts.max_steps - facts.start_step)
    epochs = steps_to_go * facts.batch.train_batch_size / facts.data.train.num_samples
    tokens = facts.batch.train_batch_size * facts.config.data.max_seq_length
    return (
        f"{facts.max_steps:,}{done}; {epochs:,.2f} epochs to go, of up to {_millions(tokens)} tokens a step, "
        f"{_millions(tokens * steps_to_go)} in all"
    )


def _cadence(every_steps: int | None) -> str:
    return "at the end" if every_steps is None else f"every {_counted(every_steps, 'step')} and at the end"


def _checkpoint_text(checkpoint: CheckpointConfig) -> str:
    kept = "all stay" if checkpoint.keep_last is None else f"the last {checkpoint.keep_last} stay"
    if checkpoint.keep_last is not None and checkpoint.keep_every_steps is not None:
        kept += f", and every {_counted(checkpoint.keep_every_steps, 'step')}"
    return f"{_cadence(checkpoint.save_every_steps)}; {kept}"


def _evaluation_line(config: RunConfig, data: PreparedData) -> list[tuple[str, str]]:
    if data.validation is None:
        return []
    most = (
        f", of at most {_counted(config.eval.batches, 'micro-batch', 'micro-batches')}" if config.eval.batches else ""
    )
    return [("evaluates", f"{_cadence(config.eval.every_steps)}{most}")]


def _shares_line(config: RunConfig, data: PreparedData) -> list[tuple[str, str]]:
    """Return which share of the samples each source gives, if there are several."""
    if len(config.data.sources) == 1:
        return []
    names = [f"{source.kind} {source.path}" if source.path else source.kind for source in config.data.sources]
    parts = [f"{name} {share / sum(data.train.draws):.1%}" for name, share in zip(names, data.train.draws, strict=True)]
    return [("sources", ", ".join(parts))]


def _optimizer_text(optimizer: OptimizerConfig) -> str:
    text = f"{optimizer.type}, lr {optimizer.lr:g}"
    if "betas" in OPTIMIZER_TERMS[optimizer.type].params:
        text += ", betas {:g} {:g}".format(*optimizer.betas)
    text += f", weight decay {optimizer.weight_decay:g}"
    text += OPTIMIZERS[optimizer.type].text(optimizer)
    return text if optimizer.bias_correction else f"{text}, no bias correction"


def _schedule_text(schedule: ScheduleConfig, total_steps: int) -> str:
    decay = {
        "EE": f"x {schedule.decay_rate:g} every {schedule.decay_steps:,} steps",
        "LE": f"x {schedule.decay_rate:g} every {schedule.decay_steps:,} steps",
        "EP": f"quadratic decay to 0 at step {total_steps:,}",
        "linear": f"linear decay to 0 at step {total_steps:,}",
        "cosine": f"cosine decay to 0 at step {total_steps:,}",
        "constant": "constant",
        "wsd": f"constant, and decay to 0 over the last {schedule.decay_proportion:.0%} of {total_steps:,} steps",
    }[schedule.type]
    warmup_steps = round(warmup_length(schedule, total_steps))
    warmup = f"warm-up of {_counted(warmup_steps, 'step')}" if warmup_steps else "no warm-up"
    offset = f", plus {schedule.lr_offset:g} throughout" if schedule.lr_offset else ""
    return f"{schedule.type}: {warmup}, then {decay}{offset}"


def _counted(count: int, one: str, many: str | None = None) -> str:
    """`1 step`, `1,200 steps`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _millions(count: int) -> str:
    """`334.6 M`, `1.31 B`, or the count itself below 100,000."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} B"
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"


def _aligned(title: str, lines: list[tuple[str, str]], text_width: int | None = None) -> str:
    """Return title and lines, the texts in one column; one wider than text_width goes on below, None keeps it on one line."""
    # Paths stay whole, to be copied.
    wrapper = textwrap.TextWrapper(text_width or 0, break_long_words=False, break_on_hyphens=False)
    label_width = max(len(label) for label, _ in lines)
    rendered = [title]
    for label, text in lines:
        parts = [text] if text_width is None else wrapper.wrap(text)
        rendered.append(f"  {label:<{label_width}}  {parts[0]}")
        rendered += [" " * (label_width + 4) + part for part in parts[1:]]
    return "\n".join(rendered)
