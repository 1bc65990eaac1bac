"""One row of what a run measured, and the rates that follow from it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StepRecord:
    """The last of a window of steps, and sums over that window: all steps since the previous record.

    All counts are over all processes. loss, losses and the fields up to skipped_steps are those of the last step.
    """

    step: int
    """Steps completed since the start of training, this one included."""
    epoch: int
    samples: int
    """Sequences trained on since the start of training."""
    losses: Mapping[str, float]
    """Parts of the loss by name, such as mlm and nsp; empty where there is one part only."""
    loss: float
    lr: float
    grad_norm: float | None
    loss_scale: float | None
    """None unless fp16."""
    skipped_steps: int
    """Steps since the start of training that were left out because a gradient was not finite."""
    num_steps: int
    """Length of the window."""
    step_time_s: float
    """Wall time of the window, the wait for data included."""
    data_wait_s: float
    sequences: int
    real_tokens: int
    """Tokens that are not padding."""
    padded_tokens: int
    """Token positions computed on, padding included."""
    model_flops: float | None
    """Operations that forward and backward of the window need, without recomputation."""
    memory_gib: float | None
    """Most device memory allocated by one process so far; None on a CPU."""
    histograms: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Figures of the optimizer by name, such as LAMB's trust ratio of every tensor."""


def rates_of(record: StepRecord, peak: float | None) -> dict[str, float | None]:
    """Return the throughput of the window, to six significant digits; mfu is None where peak or operations are unknown."""
    seconds = record.step_time_s
    rates: dict[str, float | None] = {
        "seq_per_s": ratio(record.sequences, seconds),
        "tokens_per_s": ratio(record.real_tokens, seconds),
        "padded_tokens_per_s": ratio(record.padded_tokens, seconds),
        "mfu": None,
        "step_time_s": ratio(seconds, record.num_steps),
        "data_wait_fraction": ratio(record.data_wait_s, seconds),
    }
    if peak is not None and record.model_flops is not None:
        rates["mfu"] = ratio(record.model_flops, seconds * peak)
    return {name: None if value is None else float(f"{value:.6g}") for name, value in rates.items()}


def ratio(numerator: float, denominator: float) -> float:
    """Return the quotient; NaN over zero, which is written as null."""
    return numerator / denominator if denominator else math.nan
