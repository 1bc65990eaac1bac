"""What is done about a loss or gradient that is not finite, about a loss that jumps, and about a loss scale without room."""

import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ...kernels.errors import UserError
from ..config.schema import ReliabilityConfig
from ..optim.engine import loss_scale, step_was_skipped
from ..processes import console
from ..processes.topology import Topology
from .steps import StepData, train_step

_LOG = logging.getLogger(__name__)

_MEDIAN_OF, _FEWEST_LOSSES = 32, 8  # logged losses that a spike is judged by
_MOST_NAMES = 4


class NotFiniteError(UserError):
    """Training cannot go on with these numbers."""


class RollBack(Exception):  # noqa: N818  no error: training goes on
    """Training is to go on from the newest checkpoint, behind the samples it has seen; the text says why."""


class NumericsGuard:
    """Judges each step by the section `reliability`. Every process makes one and asks it alike, with equal answers.

    The engine has left weights and moments alone in a step whose loss or gradient is not finite, so there is always something
    to go on from.
    """

    def __init__(
        self, config: ReliabilityConfig, state: Mapping[str, Any] = MappingProxyType({}), *, is_main: bool
    ) -> None:
        """Make a guard that goes on from `state`, what an earlier one's `state` returned."""
        self._config, self._is_main = config, is_main
        self._skipped_in_a_row: int = state.get("skipped_in_a_row", 0)
        self._rollbacks: int = state.get("rollbacks", 0)
        self._losses: deque[float] = deque(state.get("losses", ()), maxlen=_MEDIAN_OF)
        self._in_spike: bool = state.get("in_spike", False)

    def state(self) -> dict[str, Any]:
        """Return what a guard must know to go on from here, as JSON values."""
        counts = {"skipped_in_a_row": self._skipped_in_a_row, "rollbacks": self._rollbacks}
        return {**counts, "losses": list(self._losses), "in_spike": self._in_spike}

    def check_step(self, engine: Any, step: int, samples: range, diagnose: Callable[[], str]) -> None:
        """Judge a step that the engine has ended.

        samples: positions of those that the step took. diagnose: says where numbers are not finite; called in an error.
        Raises NotFiniteError if training must stop, RollBack if it must go back.
        """
        if not step_was_skipped(engine):
            self._skipped_in_a_row = 0
            return
        scale = loss_scale(engine)
        what = f"step {step:,} (samples {samples.start:,} to {samples.stop - 1:,})"
        if scale is not None:  # fp16 finds its scale by such steps
            if scale <= self._config.min_loss_scale:
                what += f": the fp16 loss scale fell to {scale:g}, which reliability.min_loss_scale "
                what += f"{self._config.min_loss_scale:g} forbids"
                raise NotFiniteError(f"{what}: {diagnose()}; lower optimizer.lr, or use training.precision bf16")
            return
        what += ": the loss or its gradient is not finite"
        limit = self._config.nan_limit
        if self._config.nan == "skip":
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row <= limit:
                text = f"{what}; the step is skipped, weights and moments stay as they were"
                console.warn(text, _LOG, shown=self._is_main)
                return
            what += f", after {limit} skipped steps in a row (reliability.nan_limit)"
        elif self._config.nan == "rollback":
            self._roll_back(what, diagnose)
        raise NotFiniteError(f"{what}: {diagnose()}; {_REMEDY}")

    def forget_losses(self) -> None:
        """Judge the next losses by each other alone: those before are of other samples."""
        self._losses.clear()
        self._in_spike = False

    def check_loss(self, step: int, loss: float) -> None:
        """Judge a loss that is logged. Raises RollBack, or NotFiniteError after too many."""
        factor = self._config.loss_spike_factor
        if factor is None:
            return
        median = statistics.median(self._losses) if len(self._losses) >= _FEWEST_LOSSES else float("inf")
        if math.isfinite(loss):
            self._losses.append(loss)
        if not loss > factor * median:
            self._in_spike = False
            return
        what = f"step {step:,}: the loss {loss:.4g} is more than {factor:g} times the median of the last ones, {median:.4g}"
        if self._config.nan == "rollback":
            self._roll_back(what, lambda: "all numbers are finite")
        if not self._in_spike:
            self._in_spike = True
            console.warn(f"{what} (reliability.loss_spike_factor)", _LOG, shown=self._is_main)

    def _roll_back(self, what: str, diagnose: Callable[[], str]) -> None:
        self._rollbacks += 1
        if self._rollbacks > self._config.nan_limit:
            what += f", after {self._config.nan_limit} rollbacks (reliability.nan_limit)"
            raise NotFiniteError(f"{what}: {diagnose()}; {_REMEDY}")
        raise RollBack(what)


_REMEDY = (
    "the last checkpoint is as it was: lower optimizer.lr or training.gradient_clipping, look at the samples, or set "
    "reliability.nan"
)


def not_finite_places(engine: Any, data: StepData, topology: Topology) -> str:
    """Return where the numbers of that step are not finite first, found by computing it again; every process calls it alike.

    The weights must be those from before the step. Afterwards the engine holds gradients that no step must use.
    """
    outputs: list[str] = []  # inner modules first
    gradients: list[str] = []

    def look(name: str, value: Any, found: list[str]) -> None:
        if not all(bool(tensor.isfinite().all()) for tensor in _float_tensors(value)):
            found.append(name or "the model itself")

    handles: list[Any] = []
    for name, module in engine.module.named_modules():
        handles.append(module.register_forward_hook(lambda _, __, output, name=name: look(name, output, outputs)))
    for name, param in engine.module.named_parameters():
        if param.requires_grad:
            handles.append(param.register_hook(lambda gradient, name=name: look(name, gradient, gradients)))
    try:
        train_step(engine, data, topology, end_micro_batch=lambda: None)
    finally:
        for handle in handles:
            handle.remove()
    found = []
    if outputs:
        found.append(f"the first output that is not finite is that of {outputs[0]}")
    if gradients:
        names = list(dict.fromkeys(gradients))
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        found.append(f"gradients that are not finite, in the order of backward: {', '.join(names[:_MOST_NAMES])}{more}")
    told = [(rank, text) for rank, text in enumerate(topology.gather("; ".join(found))) if text]
    if not told:
        return "computed again, with other dropout, all is finite"
    rank, text = told[0]
    return text if topology.world_size == 1 else f"on rank {rank}, {text}"


def _float_tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _float_tensors(item)]
    return []
