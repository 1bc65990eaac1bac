"""What a run needs to know of GPT."""

from ...kernels.ops.choices import IGNORED
from ..config import LayerFlags, ModelConfig, ObjectiveConfig
from ..recipe import PLAIN_RUNTIME, Batch, Recipe, Runtime, SampleRules, TokenizerRules
from ..shared.flops import head_flops, layer_flops
from .model import GptForPretraining
from .samples import collate, open_samples, sample_settings
from .transformers_form import GPT_IN_TRANSFORMERS


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


GPT = Recipe(
    name="gpt",
    build_model=_build,
    loss_counts=_loss_counts,
    real_tokens=_real_tokens,
    flops_per_sample=_flops_per_sample,
    tokenizer=TokenizerRules(trained="bpe", specials={"eos": "<|endoftext|>"}, needed=("eos",)),
    samples=SampleRules(layout="stream", settings=sample_settings, open=open_samples, collate=collate),
    transformers=GPT_IN_TRANSFORMERS,
    command="sample",
)
