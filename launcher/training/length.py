"""Where a run ends: at a step that is known before it, or with training.max_hours when its time is over."""

import time
from bisect import bisect_left
from collections import deque
from fractions import Fraction

from ..config.schema import RunConfig
from ..processes.signals import StopRequest
from .phases import RunPhases
from .start import Progress

_RECENT_STEPS = 16  # the longest of which says whether there is time for another one


def last_step(config: RunConfig, progress: Progress, phases: RunPhases) -> int | None:
    """Return the step at which the run ends: the first that reaches its length, which counts from the start of its phase.

    Epochs are counted in samples and max_tokens in token positions, as steps before a resume may have taken more or fewer.
    None with max_hours.
    """
    training, step = config.training, progress.step
    if training.max_steps is not None:
        return progress.phase_start + training.max_steps
    if training.max_hours is not None:
        return None
    if training.max_tokens is not None:
        left = Fraction(training.max_tokens - (progress.tokens - progress.phase_start_tokens))
    else:
        assert training.num_epochs is not None, "the run config has one of RUN_LENGTHS"
        left = training.num_epochs - _epochs_taken(progress, phases)

    def taken(steps: int) -> Fraction:
        in_epochs = training.max_tokens is None
        return phases.epochs(step, step + steps) if in_epochs else Fraction(phases.tokens(step, step + steps))

    most = 1
    while taken(most) < left:
        most *= 2
    return step if left <= 0 else step + bisect_left(range(most + 1), left, key=taken)


def _epochs_taken(progress: Progress, phases: RunPhases) -> Fraction:
    """Return the passes over the data since the start of the clock. Samples that were not planned count as the last ones."""
    first, step = progress.phase_start, progress.step
    unplanned = progress.samples - progress.phase_start_samples - phases.samples(first, step)
    return phases.epochs(first, step) + Fraction(unplanned, phases.data_at(step - 1).train.num_samples)


class RunClock:
    """The time that a run has taken over all its starts, and with training.max_hours what of it is left.

    Every process has one and tells it what its own steps and evaluations took. Where a decision depends on the time, the
    process counts that has the least left, so that all end at the same step. A clock runs on when training goes back.
    """

    def __init__(self, progress: Progress, max_hours: float | None, evaluation_in_steps: float = 0.0) -> None:
        """Begin to measure. evaluation_in_steps: how many steps an evaluation lasts, as long as none has been measured."""
        self._begun_s, self._before_s = time.monotonic(), progress.elapsed_s
        self._phase_start_s, self._evaluation_in_steps = progress.phase_start_s, evaluation_in_steps
        self._steps_s: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._is_over = False
        self.limit_s = None if max_hours is None else 3600 * max_hours
        self.evaluation_s: float | None = None
        """How long the last evaluation took, None before one."""
        spent_s = progress.elapsed_s - progress.phase_start_s  # not `spent_s()`, which differs between processes
        self.share = 0.0 if self.limit_s is None else spent_s / self.limit_s
        """The share of the time for steps that is over when the next step begins, equal on all processes."""

    def elapsed_s(self) -> float:
        """Return the time of the run from its first step on, without that between two starts and before the first step of each.

        Once a run ends because its time is over, that is all the time: its last evaluation and save are paid for in advance.
        """
        elapsed_s = self._before_s + time.monotonic() - self._begun_s
        return max(elapsed_s, self._phase_start_s + (self.limit_s or 0.0)) if self._is_over else elapsed_s

    def spent_s(self) -> float:
        """Return the time from the start of the phase on, of which training.max_hours gives the limit."""
        return self.elapsed_s() - self._phase_start_s

    def spent_of(self) -> tuple[float, float]:
        """Return `spent_s` and the limit."""
        assert self.limit_s is not None, "a run that ends at a step has no limit"
        return self.spent_s(), self.limit_s

    def has_time(self, stop: StopRequest, step_s: float, save_s: float, *, evaluates: bool, saves: bool) -> bool:
        """Return whether there is time for another step, on every process alike; all call it after each step.

        The next step must end before the limit, less what the last evaluation and save will take, as the ones before did.
        step_s: the time of this step. save_s: that of the last save, 0 before one. evaluates, saves: what comes before the
        next step.
        """
        if self.limit_s is None:
            return True
        self._steps_s.append(step_s)
        longest_s = max(self._steps_s)
        evaluation_s = self._evaluation_in_steps * longest_s if self.evaluation_s is None else self.evaluation_s
        for_steps_s = max(self.limit_s - evaluation_s - save_s, 1e-9)
        begins_s = self.spent_s() + evaluates * evaluation_s
        ends_s = begins_s + saves * save_s + longest_s  # the last save waits for one that is written beside training
        _, (self.share, end) = stop.agreed_with(begins_s / for_steps_s, ends_s / for_steps_s)
        self._is_over = end > 1
        return not self._is_over


def is_over(config: RunConfig, progress: Progress, end: int | None) -> bool:
    """Return whether a run has reached its length where it starts. end: `last_step`."""
    if end is not None:
        return progress.step >= end
    assert config.training.max_hours is not None, "a run without a last step has a time"
    return progress.elapsed_s - progress.phase_start_s >= 3600 * config.training.max_hours
