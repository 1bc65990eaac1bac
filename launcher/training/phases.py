"""The phases of a run with their data: what each step of it takes, and its learning rate."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ...recipes.data.stream import PreparedData
from ..config.batch import BatchPlan
from ..config.phases import Phase, Phases
from ..config.schema import schedule_of
from ..optim.schedule import learning_rate


@dataclass(frozen=True)
class RunPhases:
    """What the steps of a run are made of. Steps count from step 0 of the run's checkpoints, the first step taken being 0."""

    plan: Phases
    data: Sequence[PreparedData]
    """Of each phase; phases that differ in nothing the data depends on share it."""
    start: int
    """The step from which the plan counts: `Progress.phase_start`."""

    def at(self, step: int) -> Phase:
        """Return the phase that takes this step."""
        return self.plan.at(max(0, step - self.start))

    def begins(self, step: int) -> Phase | None:
        """Return the phase that begins with this step, None if none does. The start of the run is no such phase."""
        phase = self.at(step)
        return phase if phase.number > 0 and step - self.start == phase.first else None

    def data_at(self, step: int) -> PreparedData:
        """Return the data that this step is trained on."""
        return self.data[self.at(step).number]

    def batch(self, step: int) -> BatchPlan:
        """Return the batch of a step."""
        return self.plan.batch(max(0, step - self.start))

    def samples(self, first: int, last: int) -> int:
        """Return the samples that the steps from `first` on take, up to and without `last`."""
        return self.plan.samples(first - self.start, last - self.start)

    def tokens(self, first: int, last: int) -> int:
        """Return the token positions, padding included, of the steps from `first` on, up to and without `last`."""
        return self.plan.tokens(first - self.start, last - self.start)

    def epochs(self, first: int, last: int) -> Fraction:
        """Return the passes over the data that these steps make, a sample being a share of the data of its phase."""
        total = Fraction()
        for phase, data in zip(self.plan.all, self.data, strict=True):
            border = self.plan.end_of(phase)
            begin = max(first, self.start + phase.first)
            end = last if border is None else min(last, self.start + border)
            if begin < end:
                total += Fraction(self.samples(begin, end), data.train.num_samples)
        return total

    def schedule(self, step: int, end: int | None) -> tuple[int, int | None]:
        """Return the step at which the schedule of a step begins, and its length in steps. end: the last step of the run.

        Where end is None the schedule follows the time, and has no length.
        """
        phase = self.at(step)
        begin = self.start + phase.schedule_first
        if end is None:
            return begin, None
        last = self.plan.schedule_end(phase)
        length = (end - self.start if last is None else last) - phase.schedule_first
        return begin, schedule_of(phase.config).total_steps or max(1, length)

    def learning_rate(self, step: int, end: int | None, share: float = 0.0) -> float:
        """Return the learning rate of a step. end: the last step of the run. share: of its time, for a run without an end."""
        config, (first, steps) = self.at(step).config, self.schedule(step, end)
        length, place = (1.0, share) if steps is None else (float(steps), step - first)
        return learning_rate(schedule_of(config), config.optimizer.lr, length, place)

    def begun(self, step: int) -> list[dict[str, Any]]:
        """Return the phases that took one of the steps before this one, as JSON: where each began, and its changes."""
        return self.plan.begun(step - self.start)
