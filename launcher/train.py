"""A run from its config to its last checkpoint. Read it top to bottom."""

import logging
import os
import shlex
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..recipes import RECIPES
from ..recipes.loader import prefetch
from . import checkpoint, checkpoint_store
from .batch import solve_batch
from .checkpoint_saving import CheckpointSaver
from .config import RunConfig
from .config_loading import LoadedConfig
from .deepspeed_config import deepspeed_config
from .engine import build_engine, set_learning_rate
from .init_from import load_initial
from .metrics import RunLog, peak_flops
from .optim import build_optimizer
from .pretrained import Pretrained
from .recording import Watch, device_name, make_record, startup_facts
from .report import ClosingFacts, closing_summary, startup_report
from .run_directory import log_to_file, open_run_directory, record_environment
from .schedule import learning_rate
from .setup import (
    Progress,
    Setup,
    by_main,
    checkpoint_to_load,
    loaded_text,
    model_facts,
    open_data,
    open_initial,
    open_tokenizer,
    phase_steps,
    runtime_of,
    sentence_task,
    starting_progress,
    vocabulary_size,
)
from .signals import StopRequest
from .steps import StepData, evaluate, mean_losses, read_step, step_positions, train_step
from .topology import Topology, precision, start_processes, stop_processes

_LOG = logging.getLogger(__name__)
_LOG.addHandler(logging.NullHandler())  # before there is a log file, the command line alone tells of an error


def run(loaded: LoadedConfig, *, resume: bool) -> None:
    """Trains what the config says; called on every process of the run alike, after `topology.quiet`.

    resume: continue the run directory where it has checkpoints.
    Raises ValueError for what the user can mend, OSError for what the file system refuses.
    """
    started_s = time.monotonic()
    topology = start_processes(loaded.config.reliability.hang_timeout_s, loaded.config.parallel.tensor)
    try:
        with StopRequest(topology) as stop:
            setup, progress = _prepare(loaded, topology, resume=resume)
            if progress.step >= setup.total_steps:
                _say(topology, f"nothing to do: step {progress.step:,} is reached; raise training.max_steps to go on")
            elif stop.agreed():
                _say(topology, "stopped before the first step; nothing was trained")
            else:
                _say(topology, closing_summary(_loop(setup, stop, progress, started_s)))
    except Exception:
        _LOG.exception("the run failed")
        raise
    finally:
        stop_processes()


def _say(topology: Topology, text: str) -> None:
    if topology.is_main:
        print(text, flush=True)


def _prepare(loaded: LoadedConfig, topology: Topology, *, resume: bool) -> tuple[Setup, Progress]:
    """Everything the loop needs, and where it begins; prints the start-up report."""

    def say(text: str) -> None:
        _say(topology, text)

    config = loaded.config
    number_format, why = precision(config.training.precision, topology.device)
    batch = solve_batch(config.training, topology.num_replicas)
    ds_config = deepspeed_config(config, batch, number_format, loaded.origins)
    directory = by_main(topology, lambda: open_run_directory(config, resume=resume))
    log_to_file(directory, topology.rank)
    _LOG.info("process %d of %d, pid %d", topology.rank, topology.world_size, os.getpid())
    devices = topology.gather(device_name(topology.device))
    by_main(topology, lambda: record_environment(directory, ds_config, devices))

    source = checkpoint_to_load(config, topology, directory, say, resume=resume)
    continued = source is not None and source.parent == directory.checkpoints
    weights_only = source is not None and not continued and config.load.what == "weights"
    initial = None if source is not None else open_initial(config, topology)
    tokenizer = open_tokenizer(config, topology, directory, source or initial, say)
    vocab_size = by_main(topology, lambda: vocabulary_size(config, tokenizer))
    facts = model_facts(config, vocab_size)
    if source is not None:
        by_main(topology, lambda: checkpoint.check(source, facts, None))
    data = open_data(config, topology, batch, tokenizer, say)

    engine, optimizer, told = _build(config, topology, ds_config, vocab_size, source if weights_only else initial)
    _seed_dropout(config, topology, 0)
    progress = Progress()
    if source is not None:
        state = checkpoint_store.read_state(source)
        progress = by_main(topology, lambda: starting_progress(config, state, data.fingerprint, continued=continued))
        random_state = not weights_only and checkpoint.load(engine, source, facts, topology)
        if not random_state:
            _seed_dropout(config, topology, progress.step)
        told = loaded_text(source, progress, weights_only=weights_only, random_state=random_state)
    by_main(topology, lambda: checkpoint_store.refuse_later(directory.checkpoints, progress.step))
    total_steps = progress.phase_start + phase_steps(config, data, batch)
    setup = Setup(
        config=config,
        topology=topology,
        runtime=runtime_of(config, topology),
        recipe=RECIPES[config.model.type],
        batch=batch,
        directory=directory,
        data=data,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        engine=engine,
        optimizer=optimizer,
        precision=number_format,
        total_steps=total_steps,
        schedule_steps=config.schedule.total_steps or total_steps - progress.phase_start,
    )
    say(startup_report(startup_facts(setup, progress, why, devices, told)))
    for change in directory.changed_keys:
        say(f"changed since the last start of this run: {change}")
    return setup, progress


def _build(
    config: RunConfig,
    topology: Topology,
    ds_config: dict[str, Any],
    vocab_size: int,
    weights: Path | Pretrained | None,
) -> tuple[Any, torch.optim.Optimizer, str | None]:
    """The engine around a new model, the optimizer inside it, and what the report says of its weights.

    weights: the checkpoint or the Hugging Face model that they come from, if not new.
    """
    torch.manual_seed(config.seed)
    build_model = RECIPES[config.model.type].build_model
    model = build_model(config.model, config.layer, config.objective, vocab_size, runtime_of(config, topology))
    told = None
    if isinstance(weights, Pretrained):
        taken = load_initial(model, weights, vocab_size, sentence_task(config), topology)
        told = f"{config.model.init_from} ({taken})"
    elif weights is not None:
        checkpoint.load_weights(model, weights, model_facts(config, vocab_size), topology)
    optimizer = build_optimizer(model, config.optimizer, topology.tensor_group)
    return build_engine(model, optimizer, ds_config, topology), optimizer, told


def _seed_dropout(config: RunConfig, topology: Topology, step: int) -> None:
    """Weights start equal everywhere; dropout must differ between replicas, whose processes draw alike, and by step."""
    entropy = [config.seed, topology.replica, *([step] if step else [])]
    torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1))


def _loop(setup: Setup, stop: StopRequest, progress: Progress, started_s: float) -> ClosingFacts:
    """The facts for the closing summary, after the last step or the first request to stop."""
    config, topology, batch_size = setup.config, setup.topology, setup.batch.train_batch_size
    start, saved_id, watch = progress, "", Watch()
    best: tuple[float, int] | None = None

    def read(step: int) -> StepData:
        positions = step_positions(start.position + (step - start.step) * batch_size, setup.batch, topology.replica)
        return read_step(setup.data.train, positions, setup.loss_counts, setup.recipe.real_tokens)

    saver = CheckpointSaver(setup.engine, setup.directory.checkpoints, topology, config.checkpoint)
    log = _open_log(setup, start) if topology.is_main else None
    try:
        with saver, prefetch(read, start.step, setup.total_steps) as steps:
            for data in watch.timed(steps):
                clock = progress.step - progress.phase_start
                lr = learning_rate(config.schedule, config.optimizer.lr, setup.schedule_steps, clock)
                set_learning_rate(setup.engine, lr)
                result = train_step(setup.engine, data, topology)
                progress = replace(
                    progress,
                    step=progress.step + 1,
                    samples=progress.samples + batch_size,
                    position=progress.position + batch_size,
                )
                watch.step_ends(result.totals)
                # A stop ends the run here, so this step counts as its last one.
                stopped = stop.agreed()
                last = stopped or progress.step == setup.total_steps
                if last or progress.step % config.logging.every_steps == 0:
                    record = make_record(setup, progress, lr, mean_losses(result, topology), watch)
                    if log is not None:
                        log.log_step(record)
                finished = progress.step == setup.total_steps
                if setup.data.validation is not None and _is_due(config.eval.every_steps, progress.step, finished):
                    losses = _evaluate(setup, log, progress)
                    best = min(best or (losses["loss"], progress.step), (losses["loss"], progress.step))
                if _is_due(config.checkpoint.save_every_steps, progress.step, last):
                    saved_id = _save(setup, saver, progress)
                if stopped:
                    break
    finally:
        if log is not None:
            log.close()
    return ClosingFacts(
        name=config.name,
        run_dir=str(setup.directory.root),
        ending="finished" if progress.step == setup.total_steps else "stopped as asked",
        step=progress.step,
        max_steps=setup.total_steps,
        steps_now=progress.step - start.step,
        samples=progress.samples,
        samples_now=progress.samples - start.samples,
        training_time_s=watch.training_time_s,
        wall_time_s=time.monotonic() - started_s,
        best_val_loss=None if best is None else best[0],
        best_val_step=None if best is None else best[1],
        checkpoint_id=saved_id,
        resume_command=_resume_command(topology),
    )


def _open_log(setup: Setup, start: Progress) -> RunLog:
    device = device_name(setup.topology.device)
    peak = peak_flops(device, setup.precision)
    return RunLog(
        setup.directory.root,
        setup.total_steps,
        peak_flops=None if peak is None else peak * setup.topology.world_size,
        start_step=start.step,
        start_samples=start.samples,
        tensorboard=setup.config.logging.tensorboard,
    )


def _evaluate(setup: Setup, log: RunLog | None, progress: Progress) -> dict[str, float]:
    assert setup.data.validation is not None, "asked for without held-out data"
    most_batches = setup.config.eval.batches
    parts = evaluate(setup.engine, setup.data.validation, setup.loss_counts, setup.batch, setup.topology, most_batches)
    losses = {"loss": sum(parts.values())} | (parts if len(parts) > 1 else {})
    if log is not None:
        log.log_evaluation(progress.step, progress.samples, losses)
    return losses


def _is_due(every_steps: int | None, step: int, last: bool) -> bool:
    return last or (every_steps is not None and step % every_steps == 0)


def _save(setup: Setup, saver: CheckpointSaver, progress: Progress) -> str:
    """The id of a new checkpoint of the run as it stands, which may still be on its way to the disk."""
    config, directory = setup.config, setup.directory
    epoch = progress.position // setup.data.train.num_samples
    checkpoint_id = config.checkpoint.id_format.format(step=progress.step, epoch=epoch)
    state = {
        **asdict(progress),
        "data_fingerprint": setup.data.fingerprint,
        "model": model_facts(config, setup.vocab_size),
    }
    saver.save(checkpoint_id, state, {"config.resolved.yaml": directory.config, "tokenizer": directory.tokenizer})
    return checkpoint_id


def _resume_command(topology: Topology) -> str:
    if topology.world_size > 1:
        return "the same command with --resume auto"
    arguments = [*sys.argv[1:]] if "--resume" in sys.argv else [*sys.argv[1:], "--resume", "auto"]
    return shlex.join(["xformer-train", *arguments])
