"""In which phase a step of a run is: what `phases` of a run config come to. Torch-free.

Steps are counted here as training.max_steps counts them: from step 0, or from the loaded one with load.rewarmup or load.decay.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from .batch import BatchPlan, batch_of_step, solve_batch
from .schema import PhaseConfig, RunConfig


@dataclass(frozen=True)
class Phase:
    """A stretch of a run with one config. number: 0 for the start of the run, n for item n - 1 of `phases`."""

    number: int
    first: int
    """The steps before it."""
    config: RunConfig
    """The run config with all changes up to this phase."""
    batch: BatchPlan
    """What a step takes, once training.batch_warmup_steps are over."""
    schedule_first: int
    """The step at which the clock of its schedule stands at 0."""

    @property
    def since(self) -> str:
        """Return in words where a value of its config holds, for an error."""
        return f" from phases.{self.number - 1} on" if self.number else ""


class Phases:
    """The phases of a run in their order, and the batch of every step. Steps and counts of samples are those of the plan."""

    def __init__(self, config: RunConfig, num_replicas: int) -> None:
        """Plan a run config without faults."""
        self._training, self._given = config.training, config.phases or []
        self.all: list[Phase] = []
        for number, (first, changed) in enumerate(zip(first_steps(config), phase_configs(config), strict=True)):
            begins_schedule = number == 0 or self._given[number - 1].begins_schedule
            schedule_first = first if begins_schedule else self.all[-1].schedule_first
            batch = solve_batch(changed.training, num_replicas)
            self.all.append(Phase(number, first, changed, batch, schedule_first))

    def at(self, step: int) -> Phase:
        """Return the phase that takes this step, the last one for steps beyond the end of the run."""
        return self.all[bisect_right(self.all, step, key=lambda phase: phase.first) - 1]

    def batch(self, step: int) -> BatchPlan:
        """Return the batch of a step."""
        return batch_of_step(self._training, self.at(step).batch, step)

    def end_of(self, phase: Phase) -> int | None:
        """Return the step at which the next phase begins, None for the last."""
        return self.all[phase.number + 1].first if phase.number + 1 < len(self.all) else None

    def schedule_end(self, phase: Phase) -> int | None:
        """Return the step at which another schedule than that of `phase` begins, None where none does."""
        later = (other.first for other in self.all if other.schedule_first > phase.schedule_first)
        return next(later, None)

    def begun(self, step: int) -> list[dict[str, Any]]:
        """Return the phases that took one of the steps before this one, as JSON: where each began, and its changes."""
        found = []
        for phase, given in zip(self.all[1:], self._given, strict=True):
            # Without defaults, so that a key that is new some day makes no difference.
            changes = given.model_dump(mode="json", exclude={"from_step", "from_share"}, exclude_defaults=True)
            if given.schedule is not None:
                changes["schedule"] = given.schedule.model_dump(mode="json", exclude_defaults=True)
            if phase.first < step:
                found.append({"first": phase.first, "changes": changes})
        return found

    def text(self, phase: Phase, start: int = 0) -> str:
        """Return in words which steps a phase has, and what they take. start: the steps of the run before those of the plan."""
        config, batch, end = phase.config, phase.batch, self.end_of(phase) or self._training.max_steps
        steps = f"steps {start + phase.first + 1:,} " + ("on" if end is None else f"to {start + end:,}")
        size = f"{batch.train_batch_size:,} sequences, {batch.micro_batch_size:,} in a micro-batch"
        parts = [f"{size}, of up to {config.data.max_seq_length:,} tokens", f"lr {config.optimizer.lr:g}"]
        if phase.number:
            given = self._given[phase.number - 1]
            if given.begins_schedule:
                parts[-1] += f" with a new {config.schedule.type} schedule"
            parts += [f"{key} {value:g}" for key, value in given.objective.model_dump().items()]
            weights = given.data.source_weights
            parts += [] if weights is None else [f"source weights {', '.join(f'{weight:g}' for weight in weights)}"]
        return f"phase {phase.number + 1} of {len(self.all)}, {steps}: {', '.join(parts)}"

    def warmup_text(self) -> str:
        """Return in words how the batch grows, empty if it has its size from the first step on."""
        first, steps = self._training.batch_warmup_from, self._training.batch_warmup_steps
        return (
            "" if first is None or steps is None else f"growing from {first:,} sequences over the first {steps:,} steps"
        )

    def samples(self, first: int, last: int) -> int:
        """Return the samples that the steps from `first` on take, up to and without `last`."""
        return self._before(last, in_tokens=False) - self._before(first, in_tokens=False)

    def tokens(self, first: int, last: int) -> int:
        """Return the token positions of the steps from `first` on, up to and without `last`."""
        return self._before(last, in_tokens=True) - self._before(first, in_tokens=True)

    def _before(self, step: int, *, in_tokens: bool) -> int:
        """Return the samples or token positions of the steps before `step`."""
        total = 0
        for phase in self.all:
            last = step if (end := self.end_of(phase)) is None else min(step, end)
            if last <= phase.first:
                break
            samples = self._warmed(phase, last) - self._warmed(phase, phase.first)
            total += samples * (phase.config.data.max_seq_length if in_tokens else 1)
        return total

    def _warmed(self, phase: Phase, step: int) -> int:
        """Return the samples of the steps before `step`, each with the batch of `phase` but during the warm-up of the batch."""
        growing = min(step, len(self._warmup) - 1)
        return self._warmup[growing] + (step - growing) * phase.batch.train_batch_size

    @cached_property
    def _warmup(self) -> Sequence[int]:
        """The samples before each step of the warm-up of the batch, and before the first step that has the whole batch."""
        steps = self._training.batch_warmup_steps or 0
        sizes = (batch_of_step(self._training, self.all[0].batch, step).train_batch_size for step in range(steps))
        return list(accumulate(sizes, initial=0))


def first_steps(config: RunConfig) -> list[int]:
    """Return the step at which each phase begins, 0 for the start of the run. A from_share needs training.max_steps."""
    steps = config.training.max_steps or 0
    # Rounded down, but 0.29 * 100, which is a little less than 29.
    return [0, *(phase.from_step or int((phase.from_share or 0) * steps + 1e-9) for phase in config.phases or [])]


def phase_configs(config: RunConfig) -> list[RunConfig]:
    """Return the run config as it is at the start and from each phase on, each complete and without `phases`."""
    found = [config.model_copy(update={"phases": None})]
    for phase in config.phases or []:
        found.append(_changed(found[-1], phase))
    return found


def _changed(config: RunConfig, phase: PhaseConfig) -> RunConfig:
    data, training = phase.data.model_dump(), phase.training.model_dump()
    weights = data.pop("source_weights", None)
    if weights is not None and len(weights) == len(config.data.sources):
        sources = zip(config.data.sources, weights, strict=True)
        data["sources"] = [source.model_copy(update={"weight": weight}) for source, weight in sources]
    if training:
        training |= {"batch_warmup_from": None, "batch_warmup_steps": None}
        given = config.training.model_copy(update=training)
        if given.train_batch_size is not None and given.micro_batch_size is not None:
            training["gradient_accumulation_steps"] = None
    schedule = phase.schedule or config.schedule
    if phase.schedule is None and phase.begins_schedule:
        schedule = schedule.model_copy(update={"total_steps": None})  # the length of the schedule before
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=data),
            "load": config.load.model_copy(update={"decay": config.load.decay and not phase.begins_schedule}),
            "training": config.training.model_copy(update=training),
            "objective": config.objective.model_copy(update=phase.objective.model_dump()),
            "optimizer": config.optimizer.model_copy(update=phase.optimizer.model_dump()),
            "schedule": schedule,
        }
    )
