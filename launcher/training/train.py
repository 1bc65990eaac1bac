"""A run from its config to its last loading. Read it top to bottom."""

import logging
import os
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...recipes import RECIPES
from ..checkpoint import loading, store
from ..config.batch import solve_batch
from ..config.deepspeed import deepspeed_config
from ..config.loading import LoadedConfig
from ..config.schema import RunConfig
from ..optim.engine import build_engine, zero_stage
from ..optim.optimizer import build_optimizer
from ..processes import console
from ..processes.agreement import by_main
from ..processes.signals import StopAsked, StopRequest
from ..processes.topology import Topology, precision, start_processes, stop_processes
from ..processes.watchdog import Watchdog, collective_timeout_s
from ..reporting.report import closing_summary, startup_report
from ..reporting.run_directory import RunDirectory, log_to_file, open_run_directory, record_config, record_environment
from ..trained_models.init_from import load_initial
from ..trained_models.pretrained import Pretrained
from .loop import train
from .prepare import (
    Setup,
    check_is_shared,
    last_step,
    model_facts,
    open_data,
    open_tokenizer,
    runtime_of,
    vocabulary_size,
)
from .start import Progress, checkpoint_to_load, loaded_text, open_initial, starting_progress
from .step_record import device_name, startup_facts

_LOG = logging.getLogger(__name__)
_LOG.addHandler(logging.NullHandler())  # before there is a log file, the command line alone tells of an error


def run(loaded: LoadedConfig, *, resume: bool) -> int:
    """Trains what the config says; called on every process of the run alike, after `topology.quiet`.

    Gives the exit status: 0 if the run is finished or a person stopped it, `rank_status.REQUEUE` if a scheduler did.

    resume: continue the run directory where it has checkpoints.
    Raises ValueError for what the user can mend, OSError for what the file system refuses and for a lost process.
    """
    started_s = time.monotonic()
    hang_timeout_s = loaded.config.reliability.hang_timeout_s
    topology = start_processes(collective_timeout_s(hang_timeout_s), loaded.config.parallel.tensor)
    try:
        with StopRequest(topology) as stop, Watchdog(topology, hang_timeout_s, stop) as watchdog, ExitStack() as held:
            return _train(loaded, stop, watchdog, topology, held, started_s, resume=resume)
    except Exception:
        _LOG.exception("the run failed")
        raise
    finally:
        stop_processes()


def _train(
    loaded: LoadedConfig,
    stop: StopRequest,
    watchdog: Watchdog,
    topology: Topology,
    held: ExitStack,
    started_s: float,
    *,
    resume: bool,
) -> int:
    """As `run`, with the processes up."""

    def say(text: str) -> None:
        _say(topology, text)

    try:
        setup, progress = _prepare(loaded, topology, stop, watchdog, held, resume=resume)
    except StopAsked:
        stop.agreed_now()
        say("stopped before the first step; nothing was trained")
        return stop.exit_status
    if progress.step >= setup.total_steps:
        length = "num_epochs" if loaded.config.training.max_steps is None else "max_steps"
        say(f"nothing to do: step {progress.step:,} is reached; raise training.{length} to go on")
        return 0
    if stop.agreed_now():
        say("stopped before the first step; nothing was trained")
        return stop.exit_status
    facts = train(setup, stop, watchdog, progress, say, started_s)
    say(closing_summary(loaded.config, facts))
    return 0 if facts.step == setup.total_steps else stop.exit_status


def _say(topology: Topology, text: str) -> None:
    if topology.is_main:
        console.say(text)


def _prepare(
    loaded: LoadedConfig, topology: Topology, stop: StopRequest, watchdog: Watchdog, held: ExitStack, *, resume: bool
) -> tuple[Setup, Progress]:
    """Everything the loop needs, and where it begins; prints the start-up report.

    Raises StopAsked on every process if one is told to stop while it prepares data.
    """
    say = partial(_say, topology)
    config = loaded.config
    number_format, why = precision(config.training.precision, topology.device)
    batch = solve_batch(config.training, topology.num_replicas)
    ds_config = deepspeed_config(config, batch, number_format, loaded.origins)
    directory = _open_directory(config, topology, held, resume=resume)
    watchdog.start(directory.log, forward_is_own=topology.tensor_parallel == 1 and zero_stage(ds_config) < 3)
    devices = topology.gather(device_name(topology.device))
    by_main(topology, lambda: record_environment(directory, ds_config, devices))

    source = checkpoint_to_load(config, topology, directory, say, resume=resume)
    continued = source is not None and source.parent == directory.checkpoints
    weights_only = source is not None and not continued and config.load.what == "weights"
    initial = None if source is not None else open_initial(config, topology)
    watchdog.at("prepare")
    tokenizer = open_tokenizer(config, topology, directory, source or initial, say, stop)
    vocab_size = by_main(topology, lambda: vocabulary_size(config, tokenizer))
    facts = model_facts(config, vocab_size)
    if source is not None:
        by_main(topology, lambda: loading.check(source, facts, None if weights_only else number_format))
    data = open_data(config, topology, batch, tokenizer, say, stop)
    watchdog.at("start")

    engine, optimizer, told = _build(config, topology, ds_config, vocab_size, source if weights_only else initial)
    _seed_dropout(config, topology, 0)
    progress = Progress()
    if source is not None:
        state = store.read_state(source)
        progress = by_main(topology, lambda: starting_progress(config, state, data.fingerprint, continued=continued))
        random_state = not weights_only and _restored(engine, source, facts, config, topology, progress.step)
        told = loaded_text(source, state, progress, batch, weights_only=weights_only, random_state=random_state)
    end = last_step(config, progress, data, batch)
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
        total_steps=end,
        schedule_steps=config.schedule.total_steps or end - progress.phase_start,
    )
    by_main(topology, lambda: record_config(directory, config))
    say(startup_report(startup_facts(setup, progress, why, devices, told)))
    for change in directory.changed_keys:
        say(f"changed since the last start of this run: {change}")
    return setup, progress


def _open_directory(config: RunConfig, topology: Topology, held: ExitStack, *, resume: bool) -> RunDirectory:
    directory = by_main(topology, lambda: open_run_directory(config, held, resume=resume))
    check_is_shared(directory, topology)
    log_to_file(directory, topology.rank)
    _LOG.info("process %d of %d, pid %d", topology.rank, topology.world_size, os.getpid())
    return directory


def _restored(
    engine: Any, source: Path, facts: dict[str, Any], config: RunConfig, topology: Topology, step: int
) -> bool:
    """Puts a checkpoint of `step` into the engine; whether the random state came with it. Else dropout draws anew."""
    random_state = loading.load(engine, source, facts, topology)
    if not random_state:
        _seed_dropout(config, topology, step)
    return random_state


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
        taken = load_initial(model, weights, vocab_size, config.objective.sentence_task, topology)
        told = f"{config.model.init_from} ({taken})"
    elif weights is not None:
        loading.load_weights(model, weights, model_facts(config, vocab_size), topology)
    optimizer = build_optimizer(model, config.optimizer, topology.tensor_group)
    return build_engine(model, optimizer, ds_config, topology), optimizer, told


def _seed_dropout(config: RunConfig, topology: Topology, step: int) -> None:
    """Weights start equal everywhere; dropout must differ between replicas, whose processes draw alike, and by step."""
    entropy = [config.seed, topology.replica, *([step] if step else [])]
    torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1))
