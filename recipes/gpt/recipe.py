"""What a run needs to know of GPT."""

from ...kernels.ops.choices import IGNORED
from ..config import ModelConfig, ObjectiveConfig
from ..recipe import Batch, Recipe, SampleRules, TokenizerRules
from ..shared.flops import head_flops, layer_flops
from .model import GptForPretraining, attention_window
from .samples import collate, open_samples, sample_settings
from .transformers_form import GPT_IN_TRANSFORMERS


def _loss_counts(batch: Batch, _: ObjectiveConfig) -> dict[str, int]:
    return {"clm": int((batch["labels"] != IGNORED).sum())}


def _flops_per_sample(model: ModelConfig, vocab_size: int, seq_length: float, predictions: float) -> float:
    window = attention_window(model)
    seen = None if window is None else window + 1
    return layer_flops(model, seq_length, seen) + head_flops(model, vocab_size, predictions)


GPT = Recipe(
    name="gpt",
    build_model=GptForPretraining,
    loss_counts=_loss_counts,
    real_tokens=lambda batch: batch["input_ids"].numel(),
    flops_per_sample=_flops_per_sample,
    tokenizer=TokenizerRules(trained="bpe", specials={"eos": "<|endoftext|>"}, needed=("eos",)),
    samples=SampleRules(layout="stream", settings=sample_settings, open=open_samples, collate=collate),
    transformers=GPT_IN_TRANSFORMERS,
    command="sample",
)
