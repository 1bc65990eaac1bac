"""What a run needs to know of GPT."""

from ...kernels.ops.choices import IGNORED
from ..config import LayerFlags, ModelConfig, ObjectiveConfig
from ..recipe import PLAIN_RUNTIME, Batch, Recipe, Runtime
from ..shared.flops import head_flops, layer_flops
from .model import GptForPretraining


def _build(
    model: ModelConfig,
    layer: LayerFlags,
    objective: ObjectiveConfig,
    vocab_size: int,
    runtime: Runtime = PLAIN_RUNTIME,
) -> GptForPretraining:
    return GptForPretraining(model, layer, vocab_size, runtime)


def _loss_counts(batch: Batch, _: ObjectiveConfig) -> dict[str, int]:
    return {"clm": int((batch["labels"] != IGNORED).sum())}


def _real_tokens(batch: Batch) -> int:
    return batch["input_ids"].numel()


def _flops_per_sample(model: ModelConfig, vocab_size: int, seq_length: float, predictions: float) -> float:
    return layer_flops(model, seq_length) + head_flops(model, vocab_size, predictions)


RECIPE = Recipe(_build, _loss_counts, _real_tokens, _flops_per_sample)
