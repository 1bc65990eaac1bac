"""Rules of a run config that only GPT has. No torch import."""

from collections.abc import Iterator

from ..config import DataConfig, Fault, LayerFlags, ModelConfig, ObjectiveConfig, objective_faults


def faults(model: ModelConfig, layer: LayerFlags, data: DataConfig, objective: ObjectiveConfig) -> Iterator[Fault]:
    """Yield every rule that is broken."""
    if not model.pre_layer_norm:
        yield Fault(("model.pre_layer_norm", "model.type"), "got false, but model.type gpt is pre-LN only; set true")
    if layer.unpad:
        text = "got true, but samples of model.type gpt are packed and hold no padding to remove; set false"
        yield Fault(("layer.unpad", "model.type"), text)
    if data.packing != "none":
        why = "sequences of model.type gpt are full already: windows of all documents, one behind the other"
        yield Fault(("data.packing", "model.type"), f"got {data.packing!r}, but {why}; set none")
    yield from objective_faults(model, objective, "clm")
