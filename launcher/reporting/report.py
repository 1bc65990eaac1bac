"""What a run says about itself when it starts and when it ends."""

import textwrap
from dataclasses import dataclass

from ..config.optimizers import OptimizerConfig
from ..config.schema import ScheduleConfig
from ..optim.optimizer import OPTIMIZERS
from ..optim.schedule import warmup_length
from ..processes.words import duration, number


@dataclass(frozen=True)
class StartupFacts:
    """Everything the start-up report tells; counts are over the whole run and all processes unless said otherwise."""

    name: str
    run_dir: str
    model_type: str
    num_layers: int
    hidden_size: int
    num_parameters: int
    num_parameters_without_embeddings: int
    train_batch_size: int
    micro_batch_size: int
    """Sequences per replica and micro-batch."""
    num_replicas: int
    """Copies of the model, which train on different samples."""
    tensor_parallel: int
    """Processes that share one replica."""
    sequence_parallel: bool
    gradient_accumulation_steps: int
    max_seq_length: int
    precision: str
    precision_reason: str
    """Completes "bf16: ...", such as "the GPU supports it"."""
    kernels: str
    """Which path computes the layers, such as "Triton (CUDA device)"."""
    devices: str
    """Such as "2 x NVIDIA H200 on 1 host" or "CPU, 2 processes of 1 thread"."""
    num_documents: int | None
    """None where the source is streamed and its size unknown; likewise tokens and samples."""
    num_tokens: int | None
    num_samples: int | None
    """Training samples of one epoch."""
    num_held_out_samples: int
    tokenizer_kind: str
    vocab_size: int
    start_step: int
    max_steps: int
    schedule_steps: int
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    resumed_from: str | None
    """Where weights came from and what was taken, such as "runs/a/checkpoints/step00000100 (everything)"; None: nowhere."""


@dataclass(frozen=True)
class ClosingFacts:
    """Everything the closing summary tells."""

    name: str
    run_dir: str
    ending: str
    """Completes "run NAME ...": "finished", or why it stopped, such as "stopped by SIGTERM"."""
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
    best_val_loss: float | None
    best_val_step: int | None
    checkpoint_id: str | None
    """The last complete checkpoint; None if there is none."""
    resume_command: str


def startup_report(facts: StartupFacts) -> str:
    """The start-up report: a title and aligned lines, without a newline at the end."""
    replica, replicas = ("process", "processes") if facts.tensor_parallel == 1 else ("replica", "replicas")
    batch = (
        f"{facts.train_batch_size:,} sequences = {facts.micro_batch_size:,} per {replica}"
        f" x {_counted(facts.num_replicas, replica, replicas)}"
        f" x {_counted(facts.gradient_accumulation_steps, 'micro-batch', 'micro-batches')}"
    )
    lines = [
        (
            "model",
            f"{facts.model_type}: {_counted(facts.num_layers, 'layer')}, hidden size {facts.hidden_size:,}, "
            f"{_millions(facts.num_parameters)} parameters "
            f"({_millions(facts.num_parameters_without_embeddings)} without embeddings)",
        ),
        ("batch", f"{batch}, each up to {facts.max_seq_length:,} tokens"),
        ("precision", f"{facts.precision}: {facts.precision_reason}"),
        ("kernels", facts.kernels),
        ("devices", facts.devices),
        *_parallel_line(facts),
        ("data", _data_text(facts)),
        ("tokenizer", f"{facts.tokenizer_kind}, {facts.vocab_size:,} symbols"),
        ("steps", _steps_text(facts)),
        ("optimizer", _optimizer_text(facts.optimizer)),
        ("schedule", _schedule_text(facts.schedule, facts.schedule_steps)),
        ("start", "from new weights" if facts.resumed_from is None else f"from {facts.resumed_from}"),
        ("output", facts.run_dir),
    ]
    return _aligned(f"run {facts.name}", lines, text_width=88)


def _parallel_line(facts: StartupFacts) -> list[tuple[str, str]]:
    if facts.tensor_parallel == 1:
        return []
    shared = "layers, embedding, head and tokens" if facts.sequence_parallel else "layers, embedding and head"
    return [("parallel", f"{facts.tensor_parallel} processes share the {shared} of a replica")]


def closing_summary(facts: ClosingFacts) -> str:
    """The closing summary: a title and aligned lines, without a newline at the end."""
    speed = number(facts.samples_now / facts.training_time_s) if facts.training_time_s > 0 else "n/a"
    since_start = f" ({facts.steps_now:,} since this start)" if facts.steps_now != facts.step else ""
    lines = [
        ("steps", f"{facts.step:,} of {facts.max_steps:,}{since_start}"),
        ("samples", f"{facts.samples:,}"),
        ("time", f"{duration(facts.wall_time_s)}, {duration(facts.training_time_s)} of it in steps"),
        ("speed", f"{speed} sequences/s on average"),
    ]
    if facts.best_val_loss is not None:
        lines.append(("held-out", f"best loss {facts.best_val_loss:.4f} at step {facts.best_val_step:,}"))
    lines += [
        ("checkpoint", facts.checkpoint_id or "none"),
        ("output", facts.run_dir),
    ]
    if facts.checkpoint_id is not None:
        lines.append(("to resume", facts.resume_command))
    return _aligned(f"run {facts.name} {facts.ending}", lines)


def _data_text(facts: StartupFacts) -> str:
    sizes = [
        (facts.num_documents, "documents"),
        (facts.num_tokens, "tokens"),
        (facts.num_samples, "samples per epoch"),
    ]
    known = [f"{size:,} {what}" for size, what in sizes if size is not None] or ["streamed, size unknown"]
    held_out = f"{facts.num_held_out_samples:,} samples held out" if facts.num_held_out_samples else "none held out"
    return ", ".join([*known, held_out])


def _steps_text(facts: StartupFacts) -> str:
    text = f"{facts.max_steps:,}" + (f", {facts.start_step:,} of them done" if facts.start_step else "")
    if not facts.num_samples:
        return text
    # The steps that are done may have been on other data, so epochs are those of the steps to come.
    epochs = (facts.max_steps - facts.start_step) * facts.train_batch_size / facts.num_samples
    return f"{text}; {epochs:,.2f} epochs to go"


def _optimizer_text(optimizer: OptimizerConfig) -> str:
    beta1, beta2 = optimizer.betas
    text = f"{optimizer.type}, lr {optimizer.lr:g}, betas {beta1:g} {beta2:g}, weight decay {optimizer.weight_decay:g}"
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
    """Title and lines, the texts in one column; a text wider than text_width goes on below, None keeps it on one line."""
    # Paths stay whole, to be copied.
    wrapper = textwrap.TextWrapper(text_width or 0, break_long_words=False, break_on_hyphens=False)
    label_width = max(len(label) for label, _ in lines)
    rendered = [title]
    for label, text in lines:
        parts = [text] if text_width is None else wrapper.wrap(text)
        rendered.append(f"  {label:<{label_width}}  {parts[0]}")
        rendered += [" " * (label_width + 4) + part for part in parts[1:]]
    return "\n".join(rendered)
