"""What a run says about itself when it starts and when it ends."""

import shlex
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...recipes import RECIPES
from ...recipes.data.run_tokenizer import RunTokenizer
from ...recipes.data.stream import PreparedData
from ..config.optimizers import OPTIMIZER_TERMS, OptimizerConfig
from ..config.schema import CheckpointConfig, Precision, RunConfig, schedule_of
from ..optim.optimizer import OPTIMIZERS
from ..optim.schedule import warmup_length
from ..processes.kernels import layers_text
from ..processes.products import Products
from ..processes.words import duration, number

if TYPE_CHECKING:
    from .loop import Tally
    from .prepare import Setup
    from .start import Progress


def startup_report(
    setup: "Setup",
    progress: "Progress",
    tokenizer: RunTokenizer,
    parameters: Sequence[int],
    devices: Sequence[str],
    *,
    products: Products,
    kernels: str,
    start: str,
) -> str:
    """Return the start-up report: a title and aligned lines, without a newline at the end.

    parameters: the number of all of the model, and of those outside embeddings. devices: the name of each process's. kernels:
    which path computes the layers. start: where the run starts and what it takes from there, as "new weights".
    """
    config, phases, model = setup.config, setup.phases, setup.config.model
    batch, data, warmup = phases.plan.all[0].batch, phases.data[0], phases.plan.warmup_text()
    alone = config.parallel.tensor == 1
    replica, replicas = ("process", "processes") if alone else ("replica", "replicas")
    shared = "layers, embedding, head and tokens" if config.parallel.sequence else "layers, embedding and head"
    held_out = "none" if data.validation is None else f"{data.validation.num_samples:,} {data.sizes.unit}"
    lines = [
        (
            "model",
            f"{model.type}: {_counted(model.num_hidden_layers, 'layer')}, hidden size {model.hidden_size:,}, "
            f"{_millions(parameters[0])} parameters ({_millions(parameters[1])} without embeddings)",
        ),
        ("layers", layers_text(model)),
        (
            "batch",
            f"{batch.train_batch_size:,} sequences = {batch.micro_batch_size:,} per {replica}"
            f" x {_counted(batch.num_replicas, replica, replicas)}"
            f" x {_counted(batch.gradient_accumulation_steps, 'micro-batch', 'micro-batches')}"
            f", each up to {config.data.max_seq_length:,} tokens{warmup and f', {warmup}'}",
        ),
        ("precision", f"{products.precision}: {products.why}"),
        ("products", products.text),
        ("kernels", kernels),
        ("devices", ", ".join(f"{n} x {name}" if n > 1 else name for name, n in Counter(devices).items())),
        ("parallel", "" if alone else f"{config.parallel.tensor} processes share the {shared} of a replica"),
        ("ZeRO", f"stage {setup.engine.zero_optimization_stage()}"),
        (
            "data",
            f"{data.sizes.documents:,} documents, {data.sizes.tokens:,} tokens, {data.train.num_samples:,} "
            f"{data.sizes.unit} per epoch, {held_out} held out",
        ),
        ("packing", "" if data.sizes.packing is None else str(data.sizes.packing)),
        ("sources", _shares_text(config, data)),
        ("tokenizer", f"{tokenizer.kind}, {tokenizer.vocab_size:,} symbols"),
        ("steps", _steps_text(setup, progress)),
        ("optimizer", _optimizer_text(config.optimizer, setup.precision) + _ema_text(config)),
        ("schedule", _schedule_text(config, *phases.schedule(phases.start, setup.total_steps))),
        *_phase_lines(setup),
        ("saves", _checkpoint_text(config.checkpoint)),
        ("evaluates", "" if data.validation is None else _evaluation_text(config)),
        ("start", f"from {start}"),
        ("output", str(setup.directory.root)),
    ]
    return _aligned(f"run {config.name}", lines, text_width=88)


def closing_summary(setup: "Setup", tally: "Tally", wall_time_s: float) -> str:
    """Return the closing summary: a title and aligned lines, without a newline at the end.

    wall_time_s: since the start of the process, evaluation and checkpoints included.
    """
    config, progress, root = setup.config, tally.progress, str(setup.directory.root)
    training_time_s = tally.watch.training_time_s
    speed = number(tally.samples / training_time_s) if training_time_s > 0 else "n/a"
    since_start = f" ({tally.steps:,} since this start)" if tally.steps != progress.step else ""
    best = "" if progress.best_loss is None else f"best loss {progress.best_loss:.4f} at step {progress.best_step:,}"
    lines = [
        ("steps", f"{progress.step:,}{_length_text(setup)}{since_start}"),
        ("samples", f"{progress.samples:,}"),
        ("time", f"{duration(wall_time_s)}, {duration(training_time_s)} of it in steps"),
        ("speed", f"{speed} sequences/s on average"),
        ("held-out", best),
        ("ema", _ema_loss_text(tally)),
        ("checkpoint", tally.saved_id or "none"),
        ("output", root),
    ]
    if not tally.finished:
        lines.append(("to resume", _resume_command(setup.topology.world_size) if tally.saved_id else ""))
        return _aligned(f"run {config.name} stopped as asked", lines)
    command, run = RECIPES[config.model.type].command, f"--run {shlex.quote(root)}"
    asked = {"sample": '--prompt "Once"', "fill-mask": '"a [MASK]"'}[command]
    lines += [
        ("to try", f"xformer-train {command} {run} {asked}"),
        ("to export", f"xformer-train export {run} --to DIR"),
        ("to plot", f"tensorboard --logdir {shlex.quote(root)}" if config.logging.tensorboard else ""),
    ]
    return _aligned(f"run {config.name} finished", lines)


def _resume_command(world_size: int) -> str:
    if world_size > 1:
        return "the same command with --resume auto (with launch, behind --)"
    return shlex.join(["xformer-train", *sys.argv[1:], *([] if "--resume" in sys.argv else ["--resume", "auto"])])


def _length_text(setup: "Setup") -> str:
    if setup.total_steps is None:
        return f" in training.max_hours {setup.config.training.max_hours:g}"
    return f" of {setup.total_steps:,}"


def _steps_text(setup: "Setup", progress: "Progress") -> str:
    phases, step = setup.phases, progress.step
    firsts = [phases.start + phase.first for phase in phases.plan.all]
    warmed = phases.start + (setup.config.training.batch_warmup_steps or 0)
    last = warmed if setup.total_steps is None else setup.total_steps - 1
    # The largest step of a phase is its first, or while the batch grows its last.
    a_step = max(phases.tokens(one, one + 1) for one in {*firsts, *(first - 1 for first in firsts[1:]), last})
    of_up_to = f"of up to {_millions(a_step)} tokens a step"
    if setup.total_steps is None:
        spent_s, hours = progress.elapsed_s - progress.phase_start_s, setup.config.training.max_hours
        done = f", {duration(spent_s)} of them over at step {step:,}" if step else ""
        return f"as many as training.max_hours {hours:g} has time for{done}, {of_up_to}"
    done = f", {step:,} of them done" if step else ""
    # The steps that are done may have been on other data, so epochs are those of the steps to come.
    end = max(step, setup.total_steps)
    to_go = f"{float(phases.epochs(step, end)):,.2f} epochs to go, {of_up_to}"
    max_tokens = setup.config.training.max_tokens
    why = f" for training.max_tokens {_millions(max_tokens)}" if max_tokens else ""
    return f"{setup.total_steps:,}{why}{done}; {to_go}, {_millions(phases.tokens(step, end))} in all"


def _phase_lines(setup: "Setup") -> list[tuple[str, str]]:
    """Return a line for each phase of a run that has some, the data of those that have others than the run at its start too."""
    plan, data = setup.phases.plan, setup.phases.data
    lines = []
    for phase in plan.all if len(plan.all) > 1 else []:
        label, _, text = plan.text(phase, setup.phases.start).partition(", ")
        own = data[phase.number]
        held_out = "" if own.validation is None else f", {own.validation.num_samples:,} held out"
        other = phase.number and own is not data[phase.number - 1]
        samples = f"; {own.train.num_samples:,} {own.sizes.unit} per epoch{held_out}" if other else ""
        if phase.number and phase.schedule_first == phase.first:
            schedule = setup.phases.schedule(setup.phases.start + phase.first, setup.total_steps)
            samples += f"; {_schedule_text(phase.config, *schedule)}"
        lines.append((" ".join(label.split()[:2]), f"{text}{samples}"))
    return lines


def _cadence(every_steps: int | None) -> str:
    return "at the end" if every_steps is None else f"every {_counted(every_steps, 'step')} and at the end"


def _checkpoint_text(checkpoint: CheckpointConfig) -> str:
    kept = "all stay" if checkpoint.keep_last is None else f"the last {checkpoint.keep_last} stay"
    if checkpoint.keep_last is not None and checkpoint.keep_every_steps is not None:
        kept += f", and every {_counted(checkpoint.keep_every_steps, 'step')}"
    return f"{_cadence(checkpoint.save_every_steps)}; {kept}"


def _evaluation_text(config: RunConfig) -> str:
    most = config.eval.batches
    of_most = f", of at most {_counted(most, 'micro-batch', 'micro-batches')}" if most else ""
    return f"{_cadence(config.eval.every_steps)}{of_most}"


def _shares_text(config: RunConfig, data: PreparedData) -> str:
    if len(config.data.sources) == 1:
        return ""
    names = [f"{source.kind} {source.path}" if source.path else source.kind for source in config.data.sources]
    shares = [draws / sum(data.train.draws) for draws in data.train.draws]
    return ", ".join(f"{name} {share:.1%}" for name, share in zip(names, shares, strict=True))


def _optimizer_text(optimizer: OptimizerConfig, precision: Precision) -> str:
    text = f"{optimizer.type}, lr {optimizer.lr:g}"
    if "betas" in OPTIMIZER_TERMS[optimizer.type].params:
        text += ", betas {:g} {:g}".format(*optimizer.betas)
    text += f", weight decay {optimizer.weight_decay:g}{OPTIMIZERS[optimizer.type].text(optimizer, precision)}"
    return text if optimizer.bias_correction else f"{text}, no bias correction"


def _ema_text(config: RunConfig) -> str:
    decay = config.training.ema_decay
    if decay is None:
        return ""
    return f"; mean of the weights with decay {decay:g}, over some {1 / (1 - decay):,.0f} steps"


def _ema_loss_text(tally: "Tally") -> str:
    if tally.ema_loss is None:
        return ""
    return f"loss {tally.ema_loss:.4f} at step {tally.ema_step:,} with the mean of the weights, which --ema takes"


def _schedule_text(config: RunConfig, first: int, total_steps: int | None) -> str:
    """Return a schedule in words. first: the step from which it counts; total_steps: None where it follows the time."""
    schedule = schedule_of(config)
    exponential = f"x {schedule.decay_rate:g} every {schedule.decay_steps:,} steps"
    exponential += f" towards {schedule.min_lr:g}" if schedule.min_lr else ""
    decay_words = "decay" if schedule.decay == "linear" else f"{schedule.decay} decay"
    end = f"to {schedule.min_lr:g}"
    at, length = "where the time is over", "the time"
    if total_steps is not None:
        at, length = f"at step {first + total_steps:,}", _counted(total_steps, "step")
    if config.load.decay:
        return f"wsd: its {decay_words} {end} alone, over {length}"
    decay = {
        "EE": exponential,
        "LE": exponential,
        "EP": f"quadratic decay {end} {at}",
        "linear": f"linear decay {end} {at}",
        "cosine": f"cosine decay {end} {at}",
        "constant": "constant",
        "wsd": f"constant, and {decay_words} {end} over the last {schedule.decay_proportion:.0%} of {length}",
    }[schedule.type]
    if total_steps is None:
        rises = f"{schedule.warmup_proportion:.1%} of the time" if schedule.warmup_proportion else ""
    else:
        warmup_steps = round(warmup_length(schedule, total_steps))
        rises = _counted(warmup_steps, "step") if warmup_steps else ""
    warmup = f"warm-up of {rises}" if rises else "no warm-up"
    offset = f", plus {schedule.lr_offset:g} throughout" if schedule.lr_offset else ""
    return f"{schedule.type}: {warmup}, then {decay}{offset}"


def _counted(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _millions(count: int) -> str:
    """`334.6 M`, `1.31 B`, or the count itself below 100,000."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} B"
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"


def _aligned(title: str, lines: list[tuple[str, str]], text_width: int | None = None) -> str:
    """Return title and lines, those without text left out, the texts in one column.

    One wider than text_width goes on below; None keeps it on one line.
    """
    # Paths stay whole, to be copied.
    wrapper = textwrap.TextWrapper(text_width or 0, break_long_words=False, break_on_hyphens=False)
    lines = [(label, text) for label, text in lines if text]
    label_width = max(len(label) for label, _ in lines)
    rendered = [title]
    for label, text in lines:
        parts = [text] if text_width is None else wrapper.wrap(text)
        rendered.append(f"  {label:<{label_width}}  {parts[0]}")
        rendered += [" " * (label_width + 4) + part for part in parts[1:]]
    return "\n".join(rendered)
