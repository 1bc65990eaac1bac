"""The steps of a run, from the first to the last: train, log, evaluate, save, and stop or go back where that is asked for."""

import logging
import math
import time
from dataclasses import asdict, dataclass, replace
from functools import partial

from ...recipes.data.prefetch import prefetch
from ...recipes.data.stream import SampleStream
from ..checkpoint import store
from ..checkpoint.saving import CheckpointSaver
from ..config.file import plain_values
from ..optim.ema import mean_in_model
from ..optim.engine import set_batch, set_learning_rate
from ..processes import console
from ..processes.agreement import agreed
from ..processes.topology import device_name
from ..reporting.metrics import RunLog
from ..reporting.peak_flops import peak_flops
from .length import RunClock
from .non_finite import NotFiniteError, NumericsGuard, RollBack, not_finite_places
from .prepare import Setup, model_facts
from .start import Progress, continue_run, has_checkpoint
from .step_record import Watch, make_record
from .steps import StepData, evaluate, evaluation_rounds, mean_losses, read_step, step_positions, train_step

_LOG = logging.getLogger(__name__)


@dataclass
class Tally:
    """What the loop leaves, whether or not it went back in between."""

    progress: Progress
    watch: Watch
    saved_id: str = ""
    """The last complete checkpoint; empty if there is none."""
    finished: bool = False
    """Whether the run has reached its length."""
    steps: int = 0
    """Steps of this start, without those before a resume; likewise samples."""
    samples: int = 0
    ema_loss: float | None = None
    """The last validation loss of the mean of the weights, and the step that it was measured at."""
    ema_step: int = 0


def train(setup: Setup, progress: Progress) -> Tally:
    """Train to the last step or the first request to stop. Raises NotFiniteError if its numbers do not let it go on."""
    tally = Tally(progress, Watch())
    clock = RunClock(progress, setup.config.training.max_hours, _evaluation_in_steps(setup, progress.step))
    guard = NumericsGuard(setup.config.reliability, progress.guard, is_main=setup.topology.is_main)
    with CheckpointSaver(setup.engine, setup.directory.checkpoints, setup.topology, setup.config.checkpoint) as saver:
        while True:
            try:
                _steps(setup, guard, saver, tally, clock)
                return tally
            except RollBack as why:
                setup.watchdog.at("save")
                saver.wait()
                setup.watchdog.at("start")
                tally.progress = _gone_back(setup, tally.progress, why)


def _steps(setup: Setup, guard: NumericsGuard, saver: CheckpointSaver, tally: Tally, clock: RunClock) -> None:
    """Train from `tally.progress` to the end of the run or a stop. Raises RollBack where training must go back."""
    config, topology, phases = setup.config, setup.topology, setup.phases
    start, watch, watchdog = tally.progress, tally.watch, setup.watchdog

    def read(step: int) -> StepData:
        first = start.position + phases.samples(start.step, step)
        positions = step_positions(first, phases.batch(step), topology.replica)
        return read_step(phases.data_at(step).train, positions, setup.loss_counts, setup.recipe.real_tokens)

    log = agreed(topology, (lambda: _open_log(setup, start, clock)) if topology.is_main else None)
    try:
        with prefetch(read, start.step, setup.total_steps) as steps:
            watchdog.at("data", start.step + 1)
            for data in watch.timed(steps):
                _before_step(setup, guard, log, tally)
                lr = phases.learning_rate(tally.progress.step, setup.total_steps, clock.share)
                set_learning_rate(setup.engine, lr)
                result = train_step(setup.engine, data, topology, watchdog.at)
                phase, size = phases.at(tally.progress.step), phases.batch(tally.progress.step).train_batch_size
                samples = range(tally.progress.position, tally.progress.position + size)
                tally.progress = progress = _after_step(tally, size, size * phase.config.data.max_seq_length)
                watch.step_ends(result.totals, size, size * phase.config.data.max_seq_length)
                if log is not None:
                    log.step_taken(progress.step)
                setup.threads.step_taken()
                watchdog.at("log")
                diagnose = partial(not_finite_places, setup.engine, data, topology)
                guard.check_step(setup.engine, progress.step, samples, diagnose)
                # A stop ends the run here, so this step counts as its last one.
                stopped = setup.stop.agreed()
                validation = phases.data_at(progress.step - 1).validation
                evaluates = validation is not None and _is_due(config.eval.every_steps, progress.step)
                saves = _is_due(config.checkpoint.save_every_steps, progress.step)
                finished = tally.finished = progress.step == setup.total_steps or not clock.has_time(
                    setup.stop, watch.last_step_s, saver.last_save_s, evaluates=evaluates, saves=saves
                )
                due = progress.step % config.logging.every_steps == 0 or phases.begins(progress.step)
                if stopped or finished or due:
                    record = make_record(setup, progress, lr, mean_losses(result, topology), watch)
                    if log is not None:
                        log.log_step(record)
                    guard.check_loss(progress.step, record.loss)
                beside_s = time.monotonic()
                if validation is not None and (evaluates or finished):
                    stopped |= not _evaluated(setup, validation, log, tally)
                    clock.evaluation_s = time.monotonic() - beside_s
                if saves or stopped or finished:
                    watchdog.at("save")
                    tally.progress = replace(tally.progress, guard=guard.state(), elapsed_s=clock.elapsed_s())
                    tally.saved_id = _save(setup, saver, tally.progress)
                if log is not None:
                    log.passed_beside(time.monotonic() - beside_s)
                if stopped or finished:
                    break
                watchdog.at("data", progress.step + 1)
            watchdog.at("save")  # leaving the saver waits for the save in progress
    finally:
        if log is not None:
            log.close()


def _before_step(setup: Setup, guard: NumericsGuard, log: RunLog | None, tally: Tally) -> None:
    """Give the engine the batch of the step to come, and say that a phase begins with it."""
    step, phases = tally.progress.step, setup.phases
    set_batch(setup.engine, phases.batch(step))
    phase = phases.begins(step)
    if phase is None:
        return
    if phases.data_at(step) is not phases.data_at(step - 1):
        # Losses on other samples are no better or worse, so none is the best or a spike.
        tally.progress = replace(tally.progress, best_loss=None, best_step=0)
        guard.forget_losses()
    if log is not None:
        log.say(step, phases.plan.text(phase, phases.start))


def _after_step(tally: Tally, sequences: int, tokens: int) -> Progress:
    tally.steps += 1
    tally.samples += sequences
    old = tally.progress
    new = replace(old, step=old.step + 1, samples=old.samples + sequences, position=old.position + sequences)
    return replace(new, tokens=old.tokens + tokens)


def _gone_back(setup: Setup, progress: Progress, why: RollBack) -> Progress:
    """Load the newest whole checkpoint, and return where the run goes on: after the samples that it has taken since.

    Raises NotFiniteError if there is no checkpoint, UserError if all are damaged.
    """
    config, topology, directory = setup.config, setup.topology, setup.directory
    if not has_checkpoint(directory, topology):
        remedy = "lower checkpoint.save_every_steps or optimizer.lr"
        raise NotFiniteError(f"{why}, and there is no checkpoint yet to roll back to; {remedy}")
    start = continue_run(config, topology, directory)
    saved = start.progress(setup.phases)
    start.restore(setup.engine, model_facts(config, setup.vocab_size), saved, setup.phases.batch(saved.step))
    text = f"{why}; rolled back to {start.checkpoint.name}, going on with sample {progress.position:,}"
    console.warn(text, _LOG, shown=topology.is_main)
    return replace(saved, position=progress.position)


def _open_log(setup: Setup, start: Progress, clock: RunClock) -> RunLog:
    """Return the log of the steps from `start` on, with which the directory holds a run: its folder of checkpoints too."""
    store.make_folder(setup.directory.checkpoints)
    peak, end = peak_flops(device_name(setup.topology.device), setup.precision), setup.total_steps
    return RunLog(
        setup.directory.root,
        clock.spent_of if end is None else end,
        peak_flops=None if peak is None else peak * setup.topology.world_size,
        start_step=start.step,
        start_samples=start.samples,
        tensorboard=setup.config.logging.tensorboard,
        tokens_to_go=None if end is None else lambda step: setup.phases.tokens(step, end),
        hparams=plain_values(setup.config.model_dump(mode="json")),
    )


def _evaluated(setup: Setup, validation: SampleStream, log: RunLog | None, tally: Tally) -> bool:
    """Evaluate, and return whether that came to its end, which a stop cuts short."""

    def goes_on() -> bool:
        setup.watchdog.at("evaluate")  # for each micro-batch: the whole may take longer than a hang is waited for
        setup.threads.look()
        return not setup.stop.agreed()

    if log is not None:
        log.evaluation_begins(tally.progress.step)
    measure = partial(
        evaluate,
        setup.engine,
        validation,
        setup.loss_counts,
        setup.phases.batch(tally.progress.step - 1),
        setup.topology,
        setup.config.eval.batches,
        goes_on,
    )
    parts = measure()
    if parts is None:
        return False
    losses = {"loss": sum(parts.values())} | (parts if len(parts) > 1 else {})
    progress = tally.progress
    if setup.config.training.ema_decay is not None:
        with mean_in_model(setup.engine, setup.topology):
            parts = measure()
        if parts is None:
            return False
        losses["ema"] = sum(parts.values())
        tally.ema_loss, tally.ema_step = losses["ema"], progress.step
    if losses["loss"] < (math.inf if progress.best_loss is None else progress.best_loss):
        tally.progress = replace(progress, best_loss=losses["loss"], best_step=progress.step)
    if log is not None:
        log.log_evaluation(progress.step, progress.samples, losses)
    return True


def _is_due(every_steps: int | None, step: int) -> bool:
    return every_steps is not None and step % every_steps == 0


def _evaluation_in_steps(setup: Setup, step: int) -> float:
    """Return how many steps an evaluation lasts at most: without backward half of their micro-batches' time."""
    validation, batch = setup.phases.data_at(step).validation, setup.phases.batch(step)
    if validation is None:
        return 0.0
    rounds = evaluation_rounds(validation, batch, setup.topology, setup.config.eval.batches)
    passes = 1 if setup.config.training.ema_decay is None else 2
    return passes * rounds / (2 * batch.gradient_accumulation_steps)


def _save(setup: Setup, saver: CheckpointSaver, progress: Progress) -> str:
    """Begin to save a checkpoint of the run as it stands, and return its id."""
    config, directory, phases, step = setup.config, setup.directory, setup.phases, progress.step
    data, (schedule_start, schedule_steps) = phases.data_at(step - 1), phases.schedule(step, setup.total_steps)
    epoch = progress.position // data.train.num_samples
    checkpoint_id = config.checkpoint.id_format.format(step=progress.step, epoch=epoch)
    state = {
        **asdict(progress),
        "train_batch_size": phases.batch(step).train_batch_size,
        "schedule_start": schedule_start,
        "schedule_steps": schedule_steps,
        "max_hours": config.training.max_hours,
        "data_fingerprint": data.fingerprint,
        "phases": phases.begun(step),
        "model": model_facts(config, setup.vocab_size),
    }
    saver.save(checkpoint_id, state, {"config.resolved.yaml": directory.config, "tokenizer": directory.tokenizer})
    return checkpoint_id
