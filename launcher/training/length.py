"""Where a run ends."""

from bisect import bisect_left
from fractions import Fraction

from ..config.schema import RunConfig
from .phases import RunPhases
from .start import Progress


def last_step(config: RunConfig, progress: Progress, phases: RunPhases) -> int:
    """Return the step at which the run ends: the first that reaches its length, which counts from the start of its phase.

    Epochs are counted in samples and max_tokens in token positions, as steps before a resume may have taken more or fewer.
    """
    training, step = config.training, progress.step
    if training.max_steps is not None:
        return progress.phase_start + training.max_steps
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
