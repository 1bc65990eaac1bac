"""Rules of a run config that only BERT has. No torch import."""

from collections.abc import Iterator

from ..config import DataConfig, Fault, LayerFlags, ModelConfig, ObjectiveConfig, objective_faults


def faults(model: ModelConfig, layer: LayerFlags, data: DataConfig, objective: ObjectiveConfig) -> Iterator[Fault]:
    """Yield every rule that is broken."""
    if data.packing != "none":
        yield from _packing_faults(data.packing, layer, objective)
    if not model.tie_word_embeddings:
        why = "the head of model.type bert always is the word embedding; set true"
        yield Fault(("model.tie_word_embeddings", "model.type"), f"got false, but {why}")
    yield from objective_faults(model, objective, "mlm")


def _packing_faults(packing: str, layer: LayerFlags, objective: ObjectiveConfig) -> Iterator[Fault]:
    if objective.sentence_task != "none":
        why = f"objective.sentence_task {objective.sentence_task} is judged by one [CLS] in each sequence, and packed ones have"
        remedy = "set objective.sentence_task none, or data.packing none"
        yield Fault(("data.packing", "objective.sentence_task"), f"got {packing!r}, but {why} several; {remedy}")
    if layer.unpad:
        text = f"got true, but data.packing {packing} leaves no padding to remove; set false, or data.packing none"
        yield Fault(("layer.unpad", "data.packing"), text)
