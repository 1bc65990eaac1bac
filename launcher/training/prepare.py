"""What must be there before the first step. `prepare` calls the steps below it in their order."""

import logging
import math
import os
import platform
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...kernels.errors import UserError
from ...kernels.parallel.collectives import TensorParallel
from ...kernels.parallel.sharding import is_sharded
from ...recipes import RECIPES
from ...recipes.data.run_tokenizer import RunTokenizer
from ...recipes.data.stream import PreparedData, prepare_data
from ...recipes.data.tokenizer import load_tokenizer
from ...recipes.recipe import Batch, Recipe, Runtime
from ..checkpoint import store
from ..config.batch import solve_batch
from ..config.deepspeed import Precision, deepspeed_config
from ..config.loading import LoadedConfig
from ..config.phases import Phase, Phases
from ..config.schema import RunConfig, schedule_of
from ..optim.ema import keep_mean
from ..optim.engine import build_engine, check_deepspeed_config, zero_stage
from ..optim.optimizer import build_optimizer
from ..optim.schedule import learning_rate
from ..processes import console
from ..processes.agreement import agreed, by_main
from ..processes.kernels import kernels_text
from ..processes.signals import StopRequest
from ..processes.threads import Threads, divide_cores, threads_of_run
from ..processes.topology import Topology, device_name
from ..processes.watchdog import Watchdog
from ..reporting.metrics import rows
from ..reporting.run_directory import RunDirectory, log_to_file, open_run_directory, record_config, record_environment
from .length import last_step
from .phases import RunPhases
from .products import products_of_run, record_products
from .report import startup_report
from .start import Progress, Start, choose_start

_LOG = logging.getLogger(__name__)

_VOCAB_MULTIPLE = 64  # rows of the embedding are rounded up to it: odd sizes slow the head's GEMM down on GPUs


@dataclass(frozen=True)
class Setup:
    """Everything the loop works with; nothing in it changes but the weights and moments."""

    config: RunConfig
    topology: Topology
    threads: Threads
    stop: StopRequest
    watchdog: Watchdog
    directory: RunDirectory
    phases: RunPhases
    vocab_size: int
    engine: Any
    optimizer: torch.optim.Optimizer
    precision: Precision
    total_steps: int | None
    """The step at which the run ends; None with training.max_hours."""

    @property
    def recipe(self) -> Recipe:
        """What is said of the kind of the run's model."""
        return RECIPES[self.config.model.type]

    def loss_counts(self, batch: Batch) -> dict[str, int]:
        """Return the terms of each part of the loss of a batch."""
        return self.recipe.loss_counts(batch, self.config.objective)


def prepare(
    loaded: LoadedConfig, topology: Topology, stop: StopRequest, watchdog: Watchdog, held: ExitStack, *, resume: bool
) -> tuple[Setup, Progress]:
    """Return everything the loop needs, and where it begins; print the start-up report.

    held: keeps the run directory until it is closed. Raises StopAsked on every process if one is told to stop meanwhile.
    """
    config = loaded.config
    batch = solve_batch(config.training, topology.num_replicas)
    products = products_of_run(config, batch, topology, held, resume=resume)
    ds_config = deepspeed_config(config, batch, products.precision, loaded.origins)
    check_deepspeed_config(ds_config, topology)
    directory = _open_directory(config, topology, held, resume=resume)
    watchdog.start(directory.log, forward_is_own=topology.tensor_parallel == 1 and zero_stage(ds_config) < 3)
    devices = topology.gather(device_name(topology.device))
    by_main(topology, lambda: record_environment(directory, ds_config, devices))
    by_main(topology, lambda: record_products(directory, products))

    start = choose_start(config, topology, directory, resume=resume)
    by_main(topology, lambda: store.check_ids(directory.checkpoints, config.checkpoint.id_format, start.step))
    watchdog.at("prepare")
    tokenizer = _open_tokenizer(start, directory, stop)
    vocab_size = by_main(topology, lambda: vocabulary_size(config, tokenizer))
    model = model_facts(config, vocab_size)
    by_main(topology, lambda: start.check(model, products.precision))
    plan = Phases(config, topology.num_replicas)
    phases = RunPhases(plan, _open_data(plan, topology, tokenizer, stop), start.phase_start)
    watchdog.at("start")

    progress = by_main(topology, lambda: start.progress(phases))
    engine, optimizer = _build(start, model, ds_config, products.precision)
    start.restore(engine, model, progress, phases.batch(progress.step))
    end = last_step(config, progress, phases)
    by_main(topology, lambda: _check_ends(plan, None if end is None else end - phases.start))
    setup = Setup(
        config=config,
        topology=topology,
        threads=_open_threads(topology, engine, plan, held),
        stop=stop,
        watchdog=watchdog,
        directory=directory,
        phases=phases,
        vocab_size=vocab_size,
        engine=engine,
        optimizer=optimizer,
        precision=products.precision,
        total_steps=end,
    )
    by_main(topology, lambda: record_config(directory, config))
    parameters = count_parameters(engine.module, topology.tensor_parallel)
    kernels = kernels_text(config.model, config.layer, runtime_of(config, topology), topology.device)
    texts = {"kernels": kernels, "start": start.text}
    topology.say(startup_report(setup, progress, tokenizer, parameters, devices, products=products, **texts))
    for change in directory.changed_keys:
        topology.say(f"changed since the last start of this run: {change}")
    _warn_of_schedule_jump(setup, progress, start)
    return setup, progress


def _open_threads(topology: Topology, engine: Any, plan: Phases, held: ExitStack) -> Threads:
    held.callback(torch.set_num_threads, torch.get_num_threads())
    divide_cores(topology, os.environ)
    tokens = {phase.batch.micro_batch_size * phase.config.data.max_seq_length for phase in plan.all}
    return threads_of_run(topology.device, engine.module, tokens, os.environ, topology.say)


def _warn_of_schedule_jump(setup: Setup, progress: Progress, start: Start) -> None:
    """Warn if the learning rate jumps: the schedule goes on with another length, or a decay begins in one or in a warm-up."""
    first, steps = setup.phases.schedule(progress.step, setup.total_steps)
    config, begins = setup.phases.at(progress.step).config, progress.step == first
    if (start.schedule_steps is None and start.max_hours is None) or (begins and not config.load.decay):
        return
    was, *then = _schedule_place(start.schedule_steps, start.schedule_start, start.max_hours, start.saved)
    is_now, *now = _schedule_place(steps, first, config.training.max_hours, progress)
    lr, schedule = config.optimizer.lr, schedule_of(config)
    before_lr = learning_rate(config.schedule if begins else schedule, lr, *then)
    now_lr = learning_rate(schedule, lr, *now)
    if abs(now_lr - before_lr) > 0.01 * lr:
        what = f"the schedule was {was} long and is {is_now} now"
        remedy = "another run with load.path and load.rewarmup begins a schedule anew"
        if begins:
            what = f"step {progress.step:,} is in the warm-up or decay of the schedule of {was} that led there"
            remedy = "load.id names a checkpoint between the two"
        what += f", so the learning rate jumps from {before_lr:.2e} to {now_lr:.2e}"
        console.warn(f"{what}; {remedy}", _LOG, shown=setup.topology.is_main)


def _schedule_place(steps: int | None, first: int, hours: float | None, progress: Progress) -> tuple[str, float, float]:
    """Return the length of a schedule in words and in steps, or seconds where it follows the time, and how far it is."""
    if hours is not None:
        return f"{hours:g} hours", 3600 * hours, progress.elapsed_s - progress.phase_start_s
    assert steps is not None, "a schedule has a length in steps or in hours"
    return f"{steps:,} steps", steps, progress.step - first


def _open_directory(config: RunConfig, topology: Topology, held: ExitStack, *, resume: bool) -> RunDirectory:
    def open_whole() -> RunDirectory:
        found = open_run_directory(config, held, resume=resume)
        if found.metrics.exists():
            rows(found.metrics)  # a line that is none would end the run only when the log is opened
        return found

    directory = by_main(topology, open_whole)
    check_is_shared(directory, topology)
    agreed(topology, lambda: log_to_file(directory, topology.rank))
    _LOG.info("process %d of %d, pid %d", topology.rank, topology.world_size, os.getpid())
    return directory


def check_is_shared(directory: RunDirectory, topology: Topology) -> None:
    """Raise UserError on a process that does not see what the main process has written, and SystemExit on the others."""

    def look() -> None:
        if not directory.lock.exists():  # the main process has made it
            remedy = "choose an --output_dir on a disk that all machines share"
            raise UserError(f"output folder {directory.root} is not seen by {platform.node()}; {remedy}")

    agreed(topology, look)


def _open_tokenizer(start: Start, directory: RunDirectory, stop: StopRequest) -> RunTokenizer:
    """Return the run's tokenizer, which is saved in the run directory."""

    def save() -> None:
        with stop.raising():
            tokenizer = start.tokenizer()
        tokenizer.save(directory.tokenizer)

    by_main(start.topology, save)
    return agreed(start.topology, lambda: load_tokenizer(directory.tokenizer))


def vocabulary_size(config: RunConfig, tokenizer: RunTokenizer) -> int:
    """Return the rows of the word embedding, over all processes that share it.

    Raises UserError if model.vocab_size is too small for the tokenizer.
    """
    wanted, symbols = config.model.vocab_size, tokenizer.vocab_size
    if wanted == "auto":
        multiple = math.lcm(_VOCAB_MULTIPLE, config.parallel.tensor)
        return -(-symbols // multiple) * multiple
    if wanted < symbols:
        what = f"model.vocab_size={wanted:,} is smaller than the tokenizer's {symbols:,} symbols"
        raise UserError(f"{what}; raise it, or set it to auto")
    return wanted


def model_facts(config: RunConfig, vocab_size: int) -> dict[str, Any]:
    """Return what a checkpoint says of the model it holds: equal facts mean the weights fit and compute the same function."""
    model = config.model.model_dump(mode="json", exclude={"init_from"})
    return {**model, "vocab_size": vocab_size, "sentence_task": config.objective.sentence_task}


def _open_data(plan: Phases, topology: Topology, tokenizer: RunTokenizer, stop: StopRequest) -> list[PreparedData]:
    """Return the samples of each phase, made once for those that do not differ in them."""
    found: list[PreparedData] = []
    for phase in plan.all:
        keys = [(other.config.data, other.config.objective) for other in plan.all[: phase.number]]
        own = (phase.config.data, phase.config.objective)
        found.append(found[keys.index(own)] if own in keys else _open_samples(phase, topology, tokenizer, stop))
    return found


def _open_samples(phase: Phase, topology: Topology, tokenizer: RunTokenizer, stop: StopRequest) -> PreparedData:
    """Return training and validation samples; one process of each machine prepares them, the others find them in its cache.

    Raises UserError if there are fewer training samples than one step takes, or machines prepared different data.
    """
    config, batch = phase.config, phase.batch

    def prepare() -> PreparedData:
        with stop.raising():
            recipe, unpad, say = RECIPES[config.model.type], config.layer.unpad, topology.say
            return prepare_data(recipe, tokenizer, config.data, config.objective, config.seed, say, unpad=unpad)

    found = agreed(topology, prepare if topology.local_rank == 0 else None)
    # Agreed on too: a signal that has come meanwhile, perhaps to one process alone, stops it.
    data = agreed(topology, lambda: found or prepare())
    fingerprints = topology.gather(data.fingerprint)

    def check() -> None:
        if data.train.num_samples < batch.train_batch_size:
            what = f"fewer than training.train_batch_size={batch.train_batch_size:,}{phase.since}"
            held = f"data.sources hold {data.train.num_samples:,} training {data.sizes.unit}, {what}"
            raise UserError(f"{held}; add text or make the batch smaller")
        if len(set(fingerprints)) > 1:
            what = "data.sources differ between machines, so their processes would train on different data"
            raise UserError(f"{what}; give all machines the same files")

    by_main(topology, check)
    return data


def runtime_of(config: RunConfig, topology: Topology) -> Runtime:
    """Return how the model of this run computes."""
    return Runtime(
        fp8=config.training.precision == "fp8",
        activation_checkpointing=config.training.activation_checkpointing,
        parallel=TensorParallel(topology.tensor_group, config.parallel.sequence),
    )


def _build(
    start: Start, model: dict[str, Any], ds_config: dict[str, Any], dtype: Precision
) -> tuple[Any, torch.optim.Optimizer]:
    """Return the engine around a new model with the weights that the run starts from, and the optimizer inside it."""
    config, topology = start.config, start.topology
    torch.manual_seed(config.seed)
    module = RECIPES[config.model.type].build_model(
        config.model, config.layer, config.objective, model["vocab_size"], runtime_of(config, topology)
    )
    agreed(topology, lambda: start.fill(module, model))
    optimizer = build_optimizer(module, config.optimizer, topology.tensor_group, dtype)
    if config.training.ema_decay is not None:
        keep_mean(optimizer, config.training.ema_decay)
    return build_engine(module, optimizer, ds_config, topology), optimizer


def _check_ends(plan: Phases, end: int | None) -> None:
    """Raise UserError if a phase begins where the run has ended, which is known before only of training.max_steps."""
    last = plan.all[-1]
    if end is not None and last.number and last.first >= end:
        what = f"phases.{last.number - 1}.from_step={last.first:,} must be before the run ends, at step {end:,}"
        raise UserError(f"{what}; let the run be longer, or remove the phase")


def count_parameters(model: nn.Module, sharers: int) -> tuple[int, int]:
    """Return the parameters of a whole model, and those outside embeddings. sharers: processes that divide sharded ones."""
    parameters = {  # ZeRO stage 3 empties p
        id(p): getattr(p, "ds_numel", p.numel()) * (sharers if is_sharded(p) else 1) for p in model.parameters()
    }
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    in_embeddings = {id(p) for module in embeddings for p in module.parameters()}
    return sum(parameters.values()), sum(n for key, n in parameters.items() if key not in in_embeddings)
