"""Where a run ends."""

from ...recipes.data.stream import PreparedData
from ..config.batch import BatchPlan
from ..config.schema import RunConfig
from .start import Progress


def last_step(config: RunConfig, progress: Progress, data: PreparedData, batch: BatchPlan) -> int:
    """Return the step at which the run ends: the first that reaches its length, which counts from the start of its phase.

    Epochs are counted in samples and max_tokens in token positions, as steps before a resume may have taken more or fewer.
    """
    training, each = config.training, batch.train_batch_size
    if training.max_steps is not None:
        return progress.phase_start + training.max_steps
    if training.max_tokens is not None:
        length, taken = training.max_tokens, progress.tokens - progress.phase_start_tokens
        each *= config.data.max_seq_length
    else:
        assert training.num_epochs is not None, "the run config has one of RUN_LENGTHS"
        length, taken = training.num_epochs * data.train.num_samples, progress.samples - progress.phase_start_samples
    return progress.step - (-max(0, length - taken) // each)
