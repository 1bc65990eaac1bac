"""Decide where a run starts: with new weights, with those of another model, or from a checkpoint."""

import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...kernels.errors import UserError
from ..checkpoint import store
from ..config.batch import BatchPlan
from ..config.schema import RunConfig
from ..processes.agreement import agreed, by_main
from ..processes.console import Say
from ..processes.topology import Topology
from ..reporting.run_directory import RunDirectory
from ..trained_models import init_from
from ..trained_models.pretrained import Pretrained

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Where a run stands; stored in every checkpoint."""

    step: int = 0
    samples: int = 0
    """Sequences trained on since step 0."""
    position: int = 0
    """Sequences taken from the data in use; less than samples after a change of data between two phases."""
    phase_start: int = 0
    """The step at which the clock of the schedule stood at 0."""
    phase_start_samples: int = 0
    """`samples` at that step."""


def checkpoint_to_load(
    config: RunConfig, topology: Topology, directory: RunDirectory, say: Say, *, resume: bool
) -> Path | None:
    """The checkpoint this run starts from: the newest whole one of its own when it resumes, else what `load` names, else none.

    It has been read through; called by every process. Raises ValueError if what `load` names is damaged, or every checkpoint
    of the run.
    """
    if resume and by_main(topology, lambda: bool(store.entries(directory.checkpoints))):
        return _newest_whole(directory.checkpoints, topology, say)
    if config.load.path is None:
        return None
    path = Path(config.load.path)
    source = by_main(topology, lambda: store.resolve(path, config.load.id))
    problems = store.verify_together(source, topology)

    def refuse_damage() -> None:
        if problems:
            raise UserError(f"{source} is damaged: {', '.join(problems)}; choose another checkpoint")

    by_main(topology, refuse_damage)
    return source


def _newest_whole(folder: Path, topology: Topology, say: Say) -> Path:
    """The newest whole checkpoint in `folder`, which `latest` names from now on.

    Damaged ones that are newer are set aside: training meets their steps again.
    """
    entries = by_main(topology, lambda: [(entry.id, entry.problem) for entry in store.entries(folder)])
    damaged = {name: [problem] for name, problem in entries if problem}
    whole = None
    for name in reversed([name for name, problem in entries if not problem]):
        problems = store.verify_together(folder / name, topology)
        if not problems:
            whole = name
            break
        damaged[name] = problems

    def set_aside() -> None:
        told = [f"checkpoint {name} is damaged: {', '.join(problems)}" for name, problems in damaged.items()]
        if whole is None:
            raise UserError(
                f"no checkpoint in {folder} can be loaded: {'; '.join(told)}; start anew with --job_name, or bring back a copy"
            )
        for name, text in zip(damaged, told, strict=True):
            new_name = store.set_aside(folder, name)
            _LOG.warning("%s; renamed to %s", text, new_name)
            say(f"warning: {text}; renamed to {new_name}, the run goes on from {whole}")
        if store.latest_id(folder) != whole:
            with suppress(OSError):  # the run can go on without it
                store.set_latest(folder, whole)

    by_main(topology, set_aside)
    return folder / str(whole)


def open_initial(config: RunConfig, topology: Topology) -> Pretrained | None:
    """What model.init_from names, read by every process; one process of each machine fetches it, if it is on the hub.

    Raises ValueError as `init_from.read_initial` does.
    """
    name = config.model.init_from
    if name is None:
        return None

    def find() -> Path:
        return init_from.find_folder(name)

    agreed(topology, find if topology.local_rank == 0 else None)  # then it is in the cache of every machine
    return agreed(topology, lambda: init_from.read_initial(name, find(), config.model))


def starting_progress(config: RunConfig, state: dict[str, Any], fingerprint: str, *, continued: bool) -> Progress:
    """Where a run stands that starts from a checkpoint with this state.

    continued: the checkpoint is one of this run's own. Raises ValueError if the run continues on other data.
    """
    if config.load.what == "weights" and not continued:
        return Progress()
    # Checkpoints that were written before a field was there lack it.
    saved = Progress(**{name: state[name] for name in Progress.__dataclass_fields__ if name in state})
    same_data = state["data_fingerprint"] == fingerprint
    if continued:
        if not same_data:
            raise UserError(
                f"run {config.name} stopped at step {saved.step:,} on other data, another sequence length or another seed, so "
                f"it cannot be continued exactly; start a new run with --job_name and --load_training_checkpoint"
            )
        return saved
    return Progress(
        step=saved.step,
        samples=saved.samples,
        position=saved.position if same_data else 0,
        phase_start=saved.step if config.load.rewarmup else saved.phase_start,
        phase_start_samples=saved.samples if config.load.rewarmup else saved.phase_start_samples,
    )


def loaded_text(
    source: Path, state: dict[str, Any], progress: Progress, batch: BatchPlan, *, weights_only: bool, random_state: bool
) -> str:
    """What was taken from a checkpoint with this state, for the start-up report."""
    if weights_only:
        return f"{source} (weights only)"
    random = "random state" if random_state else "new random state, for another number of processes"
    data = f"data at sample {progress.position:,}" if progress.position else "new data"
    clock = "schedule restarted" if progress.phase_start == progress.step else "schedule continued"
    now = batch.train_batch_size
    then = state.get("train_batch_size", now)
    sizes = "" if now == then else f", {now} sequences per step instead of {then}"
    return f"{source} (weights, optimizer, {random}; {data}, {clock}{sizes})"
