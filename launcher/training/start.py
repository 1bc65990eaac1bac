"""Decide where a run starts: with new weights, with those of a Hugging Face model, or from a checkpoint."""

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ...kernels.errors import UserError, refused
from ...recipes import RECIPES
from ...recipes.data.run_tokenizer import RunTokenizer
from ...recipes.data.tokenizer import build_tokenizer, check_suits, given_tokenizer, load_tokenizer
from ..checkpoint import loading, store
from ..config.batch import BatchPlan
from ..config.deepspeed import Precision
from ..config.schema import RunConfig
from ..optim.ema import restored_mean
from ..optim.optimizer import moments_of
from ..processes import console
from ..processes.agreement import agreed, by_main
from ..processes.durable_files import replace_text
from ..processes.topology import Topology
from ..reporting.run_directory import RunDirectory
from ..trained_models.init_from import find_folder, initial_tokenizer, load_initial, read_initial
from ..trained_models.pretrained import Pretrained
from .phases import RunPhases

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
    tokens: int = 0
    """Token positions trained on since step 0, padding included."""
    phase_start_tokens: int = 0
    """`tokens` at the step `phase_start`."""
    elapsed_s: float = 0.0
    """What `RunClock.elapsed_s` returned."""
    phase_start_s: float = 0.0
    """`elapsed_s` at the step `phase_start`."""
    best_loss: float | None = None
    """The lowest validation loss of the run; None before an evaluation."""
    best_step: int = 0
    """The step of that loss."""
    guard: Mapping[str, Any] = field(default_factory=dict)
    """What `NumericsGuard.state` returned."""


class Start:
    """A start with new weights, at step 0. The subclasses are the other places that a run can start from.

    `choose_start` makes the one of a run. Then come `tokenizer`, `check`, `progress`, `fill` and `restore`, in this order;
    model is in all of them what `model_facts` says of the run's model.
    """

    text = "new weights"
    """What the run takes, for the start-up report; complete after `restore`."""
    step = 0
    """The step that the run starts from."""
    phase_start = 0
    """The step from which the lengths, phases and schedule of the run are counted."""
    schedule_steps: int | None = None
    """The length of the schedule that has led there, if there was one in steps."""
    schedule_start = 0
    """The step at which that schedule began."""
    max_hours: float | None = None
    """The length of the run that has led there, if it was a time."""
    saved = Progress()
    """Where that run stood."""

    def __init__(self, config: RunConfig, topology: Topology) -> None:
        self.config, self.topology = config, topology

    def tokenizer(self) -> RunTokenizer:
        """Return the run's tokenizer: that of the weights, else the given one, else a new one.

        Weights that were trained already belong to the symbols they were trained with: with them no tokenizer is trained,
        and UserError is raised if tokenizer.path names another one.
        """
        config = self.config
        return build_tokenizer(RECIPES[config.model.type], config.tokenizer, config.data, self.topology.say)

    def check(self, model: Mapping[str, Any], precision: Precision) -> None:
        """Raise UserError if this place does not suit the run's model or the precision that it trains in."""

    def progress(self, phases: RunPhases) -> Progress:
        """Return where the run stands. Raises UserError if it cannot go on with these phases and their data."""
        return Progress()

    def fill(self, module: nn.Module, model: Mapping[str, Any]) -> None:
        """Put the weights into a new module that no engine holds yet."""

    def restore(self, engine: Any, model: Mapping[str, Any], progress: Progress, batch: BatchPlan) -> None:
        """Put the rest of the state of training into the engine and the random generators."""
        _seed_dropout(self.config, self.topology, 0)


class FromPretrained(Start):
    """A start at step 0 with the weights of a Hugging Face model."""

    def __init__(self, config: RunConfig, topology: Topology, pretrained: Pretrained) -> None:
        super().__init__(config, topology)
        self.name, self.pretrained = str(config.model.init_from), pretrained

    def tokenizer(self) -> RunTokenizer:
        tokenizer = initial_tokenizer(self.name, self.pretrained, self.config.tokenizer)
        check_suits(RECIPES[self.config.model.type], tokenizer, self.name)
        return tokenizer

    def fill(self, module: nn.Module, model: Mapping[str, Any]) -> None:
        taken = load_initial(module, self.pretrained, model["vocab_size"], model["sentence_task"], self.topology)
        self.text = f"{self.name} ({taken})"


class FromCheckpoint(Start):
    """A start with what a checkpoint holds; the subclasses say how much of it."""

    def __init__(self, config: RunConfig, topology: Topology, checkpoint: Path) -> None:
        super().__init__(config, topology)
        self.checkpoint = checkpoint

    def tokenizer(self) -> RunTokenizer:
        tokenizer, given = load_tokenizer(self.checkpoint / "tokenizer"), self.config.tokenizer
        if given.path is not None and not tokenizer.equals(given_tokenizer(given)):
            what = f"tokenizer.path={given.path} is another tokenizer than that of checkpoint {self.checkpoint}"
            raise UserError(f"{what}; remove the key to use the checkpoint's")
        return tokenizer


class WeightsAlone(FromCheckpoint):
    """A start at step 0 with the weights of a checkpoint."""

    def check(self, model: Mapping[str, Any], precision: Precision) -> None:
        loading.check(self.checkpoint, model, None)

    def fill(self, module: nn.Module, model: Mapping[str, Any]) -> None:
        loading.load_weights(module, self.checkpoint, model, self.topology)
        self.text = f"{self.checkpoint} (weights only)"


class NextPhase(FromCheckpoint):
    """A start where a checkpoint of another run stands, perhaps with other data or a schedule that begins anew."""

    def __init__(self, config: RunConfig, topology: Topology, checkpoint: Path) -> None:
        super().__init__(config, topology, checkpoint)
        self.state = agreed(topology, lambda: store.read_state(checkpoint))
        # Checkpoints that were written before a field was there lack it.
        known = Progress.__dataclass_fields__.keys() & self.state.keys()
        self.saved = Progress(**{name: self.state[name] for name in known})
        if "tokens" not in self.state:
            length = config.data.max_seq_length
            counts = (self.saved.samples * length, self.saved.phase_start_samples * length)
            self.saved = replace(self.saved, tokens=counts[0], phase_start_tokens=counts[1])
        self.step, self.schedule_steps = self.saved.step, self.state.get("schedule_steps")
        self.schedule_start = self.state.get("schedule_start", self.saved.phase_start)
        self.max_hours = self.state.get("max_hours")
        self.phase_start = self.step if config.load.rewarmup or config.load.decay else self.saved.phase_start

    def check(self, model: Mapping[str, Any], precision: Precision) -> None:
        loading.check(self.checkpoint, model, precision)
        optimizer = self.config.optimizer
        loading.check_optimizer(self.checkpoint, moments_of(optimizer), optimizer.type)

    def progress(self, phases: RunPhases) -> Progress:
        if self.config.load.decay:
            self._warn_of_other_phases(phases.at(self.step).config)
        saved = replace(self.saved, best_loss=None, best_step=0, guard={})  # of the other run's losses
        if self.state.get("data_fingerprint") != phases.data_at(self.step).fingerprint:
            saved = replace(saved, position=0)
        if self.config.load.rewarmup or self.config.load.decay:
            saved = replace(saved, phase_start=saved.step, phase_start_samples=saved.samples)
            saved = replace(saved, phase_start_tokens=saved.tokens, phase_start_s=saved.elapsed_s)
        return saved

    def _warn_of_other_phases(self, config: RunConfig) -> None:
        """Warn if phases of the run before had set what the decay does not begin with."""
        had: dict[str, Any] = {}
        for phase in _what_counts(self.state.get("phases", [])):
            sections = {name: changes for name, changes in phase["changes"].items() if name != "schedule"}
            had |= {f"{name}.{key}": value for name, changes in sections.items() for key, value in changes.items()}
        now = config.model_dump(mode="json")
        now["data"]["source_weights"] = [source.weight for source in config.data.sources]
        others = [f"{key} {value}" for key, value in had.items() if now[key.split(".")[0]][key.split(".")[1]] != value]
        if others:
            name = self.checkpoint.parent.parent.name
            what = f"at step {self.step:,} the phases of {name} had set {', '.join(others)}, unlike this run config"
            console.warn(
                f"{what}; set them in its sections, and no phases, for a decay that goes on as {name} would", _LOG
            )

    def restore(self, engine: Any, model: Mapping[str, Any], progress: Progress, batch: BatchPlan) -> None:
        random = "random state"
        if not loading.load(engine, self.checkpoint, model, self.topology):
            random = "new random state, for another number of processes"
            _seed_dropout(self.config, self.topology, progress.step)
        mean = restored_mean(engine.basic_optimizer, kept=self.config.training.ema_decay is not None)
        data = f"data at sample {progress.position:,}" if progress.position else "new data"
        clock = "schedule restarted" if progress.phase_start == progress.step else "schedule continued"
        if self.config.load.decay and progress.phase_start == progress.step:
            clock = f"decay branched off step {self.step:,} of {self.checkpoint.parent.parent.name}"
        now, then = batch.train_batch_size, self.state.get("train_batch_size", batch.train_batch_size)
        sizes = "" if now == then else f", {now} sequences per step instead of {then}"
        self.text = f"{self.checkpoint} (weights, optimizer{mean}, {random}; {data}, {clock}{sizes})"


class Continued(NextPhase):
    """A start where a checkpoint of this very run stands: training goes on as if it had not stopped."""

    def __init__(self, config: RunConfig, topology: Topology, checkpoint: Path) -> None:
        super().__init__(config, topology, checkpoint)
        self.phase_start = self.saved.phase_start

    def progress(self, phases: RunPhases) -> Progress:
        then, now = _what_counts(self.state.get("phases", [])), _what_counts(phases.begun(self.step))
        if then != now:
            what = f"run {self.config.name} has taken {self.step:,} steps {_phases_text(then)}, not {_phases_text(now)}"
            remedy = "put the phases that have begun back as they were: only later ones may change"
            if any(phase.from_share is not None for phase in self.config.phases or []):
                remedy += "; from_step in place of from_share stays where it is when training.max_steps changes"
            raise UserError(f"{what}; {remedy}")
        if self.state.get("data_fingerprint") != phases.data_at(self.step - 1).fingerprint:
            what = (
                f"run {self.config.name} stopped at step {self.saved.step:,} on other data, another sequence length or "
            )
            what += "another seed, so it cannot be continued exactly"
            raise UserError(f"{what}; start a new run with --job_name and --load_training_checkpoint")
        return self.saved


def _phases_text(begun: Sequence[Mapping[str, Any]]) -> str:
    """Return what `RunPhases.begun` says, in words."""
    texts = [f"from_step {phase['first']} {json.dumps(phase['changes'])}" for phase in begun]
    return f"with the phases {', '.join(texts)}" if texts else "without phases"


def _what_counts(begun: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what `RunPhases.begun` says but micro-batches, which may change with the processes of a start."""
    found = []
    for phase in begun:
        changes = dict(phase["changes"])
        training = {key: value for key, value in changes.pop("training", {}).items() if key != "micro_batch_size"}
        changes |= {"training": training} if training else {}
        found += [{"first": phase["first"], "changes": changes}] if changes else []
    return found


def choose_start(config: RunConfig, topology: Topology, directory: RunDirectory, *, resume: bool) -> Start:
    """Return where this run starts: its own newest whole checkpoint when it resumes, else what the run config names.

    All processes come here. A checkpoint has been read through. Raises UserError if what `load` names is damaged, or every
    checkpoint of the run, and as `read_initial` does.
    """
    if resume and has_checkpoint(directory, topology):
        return continue_run(config, topology, directory)
    if config.load.path is not None:
        checkpoint = _named_by_load(config, topology)
        return (WeightsAlone if config.load.what == "weights" else NextPhase)(config, topology, checkpoint)
    name = config.model.init_from
    if name is None:
        return Start(config, topology)
    # One process of each machine fetches it, if it is on the hub; then it is in the cache of every machine.
    agreed(topology, (lambda: find_folder(name)) if topology.local_rank == 0 else None)
    pretrained = agreed(topology, lambda: read_initial(name, find_folder(name), config.model))
    return FromPretrained(config, topology, pretrained)


def has_checkpoint(directory: RunDirectory, topology: Topology) -> bool:
    """Return whether this run has saved a checkpoint, be it damaged. Raises UserError if it has, and all are gone."""

    def look() -> bool:
        if directory.has_metrics and store.has_lost_all(directory.checkpoints):
            what = f"output folder {directory.root} holds metrics of a run, but {directory.checkpoints} no checkpoint any more"
            raise UserError(f"{what}; bring the checkpoints back, or start anew with --job_name")
        return bool(store.entries(directory.checkpoints))

    return by_main(topology, look)


def continue_run(config: RunConfig, topology: Topology, directory: RunDirectory) -> Continued:
    """Return the start from the newest whole checkpoint of this run. Raises UserError if all are damaged."""
    return Continued(config, topology, _newest_whole(directory.checkpoints, topology))


def _named_by_load(config: RunConfig, topology: Topology) -> Path:
    path = Path(str(config.load.path))
    checkpoint = by_main(topology, lambda: store.resolve(path, config.load.id))
    problems = store.verify_together(checkpoint, topology)
    by_main(topology, lambda: store.refuse_damaged(checkpoint, problems))
    return checkpoint


def _newest_whole(folder: Path, topology: Topology) -> Path:
    """Return the newest whole checkpoint in `folder`, which `latest` names from now on.

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
            remedy = "start anew with --job_name, or bring back a copy"
            raise UserError(f"no checkpoint in {folder} can be loaded: {'; '.join(told)}; {remedy}")
        for name, text in zip(damaged, told, strict=True):
            with refused(f"cannot rename {folder / name}", "make the folder writable"):
                new_name = store.set_aside(folder, name)
            console.warn(f"{text}; renamed to {new_name}, the run goes on from {whole}", _LOG)
        if store.latest_id(folder) != whole:
            with suppress(OSError):  # the run can go on without it
                replace_text(folder / store.LATEST, whole + "\n")

    by_main(topology, set_aside)
    return folder / str(whole)


def _seed_dropout(config: RunConfig, topology: Topology, step: int) -> None:
    """Seed torch for dropout, which must differ between replicas, whose processes draw alike, and between steps."""
    entropy = [config.seed, topology.replica, *([step] if step else [])]
    torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1))
