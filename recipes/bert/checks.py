"""Rules of a run config that only BERT has. No torch import."""

from collections.abc import Iterator

from ..config import Fault, LayerFlags, ModelConfig, ObjectiveConfig, objective_faults


def faults(model: ModelConfig, _: LayerFlags, objective: ObjectiveConfig) -> Iterator[Fault]:
    """Yield every rule that is broken."""
    yield from objective_faults(model, objective, "mlm")
