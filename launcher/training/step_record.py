"""What the loop measures of its steps, and the record that the log makes of it."""

import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch

from ...kernels.errors import UserError
from ..optim.engine import grad_norm, loss_scale, skipped_steps
from ..optim.optimizer import OPTIMIZERS
from ..processes.console import warn
from ..reporting.record import StepRecord
from .prepare import Setup
from .start import Progress

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
# Steps in a row: where half of the samples have nothing to predict, one run in a million has so many.
_MOST_UNPREDICTED = 20


class Watch:
    """Times and tokens since the last record, and the time of all steps."""

    def __init__(self) -> None:
        self.training_time_s = 0.0
        self.last_step_s = 0.0
        self.unpredicted: torch.Tensor | int = 0
        """Steps in a row, up to the last one, without any token to predict."""
        self.told_of_unpredicted = False
        self._clear()

    def _clear(self) -> None:
        self.num_steps, self.step_time_s, self.data_wait_s = 0, 0.0, 0.0
        self.sequences, self.positions = 0, 0
        self.totals: torch.Tensor | None = None

    def timed(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items; each step lasts from the request for its item to `step_ends`."""
        iterator = iter(items)
        while True:
            self._started_s = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.data_wait_s += time.perf_counter() - self._started_s
            yield item

    def step_ends(self, totals: torch.Tensor, sequences: int, positions: int) -> None:
        """Count a step. totals: `StepResult.totals`; positions: tokens of all its sequences, padding included."""
        self.num_steps += 1
        self.sequences += sequences
        self.positions += positions
        self.unpredicted = (self.unpredicted + 1) * (totals[0] == 0)  # on the device, so that nobody waits for it
        self.totals = totals if self.totals is None else self.totals + totals
        self.last_step_s = time.perf_counter() - self._started_s
        self._add(self.last_step_s)

    def _add(self, seconds: float) -> None:
        self.step_time_s += seconds
        self.training_time_s += seconds

    def wait_for_device(self) -> None:
        """Add the time that work already handed to a GPU still takes: kernels run behind the host."""
        if torch.cuda.is_available():
            started_s = time.perf_counter()
            torch.cuda.synchronize()
            self._add(time.perf_counter() - started_s)

    def take(self) -> tuple[list[float], dict[str, Any]]:
        """Return the terms of each part of the loss with the real tokens, and fields of the record, since the last call."""
        assert self.totals is not None, "a record without a step"
        totals = self.totals.tolist()
        fields = {name: getattr(self, name) for name in ("num_steps", "step_time_s", "data_wait_s", "sequences")}
        fields |= {"real_tokens": int(totals[-1]), "padded_tokens": self.positions}
        self._clear()
        return totals, fields


def make_record(setup: Setup, progress: Progress, lr: float, losses: dict[str, float], watch: Watch) -> StepRecord:
    """Return the record of the steps since the previous one; losses by part and lr are those of the last.

    Raises UserError if the last steps had no token to predict.
    """
    watch.wait_for_device()
    _check_predicts(setup, progress.step, watch)
    totals, window = watch.take()
    config, sequences = setup.config, window["sequences"]
    predictions = totals[0] / sequences  # the first part of the loss is the one over the vocabulary
    # What layer.unpad leaves out is not counted.
    length = window["real_tokens" if config.layer.unpad else "padded_tokens"] / sequences
    return StepRecord(
        step=progress.step,
        epoch=progress.position // setup.phases.data_at(progress.step - 1).train.num_samples,
        samples=progress.samples,
        losses=losses if len(losses) > 1 else {},
        loss=sum(losses.values()),
        lr=lr,
        grad_norm=grad_norm(setup.engine),
        loss_scale=loss_scale(setup.engine),
        skipped_steps=skipped_steps(setup.engine),
        **window,
        model_flops=sequences * setup.recipe.flops_per_sample(config.model, setup.vocab_size, length, predictions),
        memory_gib=torch.cuda.max_memory_allocated() / 2**30 if setup.topology.device.type == "cuda" else None,
        histograms=OPTIMIZERS[config.optimizer.type].histograms(setup.optimizer),
    )


def _check_predicts(setup: Setup, step: int, watch: Watch) -> None:
    in_a_row = int(watch.unpredicted)
    what = f"step {step:,}: no token to predict in {in_a_row:,} steps in a row, so there is no loss"
    if in_a_row >= _MOST_UNPREDICTED:
        raise UserError(f"{what}; set objective.masking to subword, or take a tokenizer that knows this text")
    if in_a_row and not watch.told_of_unpredicted:
        watch.told_of_unpredicted = True
        warn(what, _LOG, shown=setup.topology.is_main)
