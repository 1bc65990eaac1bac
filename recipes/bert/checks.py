"""Rules of a run config that only BERT has. No torch import."""

from collections.abc import Iterator

from ..config import DataConfig, Fault, LayerFlags, ModelConfig, ObjectiveConfig, objective_faults


def faults(model: ModelConfig, _: LayerFlags, __: DataConfig, objective: ObjectiveConfig) -> Iterator[Fault]:
    """Yield every rule that is broken."""
    if not model.tie_word_embeddings:
        why = "the head of model.type bert always is the word embedding; set true"
        yield Fault(("model.tie_word_embeddings", "model.type"), f"got false, but {why}")
    yield from objective_faults(model, objective, "mlm")
