"""What a run needs to know of BERT."""

from ...kernels.ops.choices import IGNORED
from ..config import ModelConfig, ObjectiveConfig
from ..recipe import Batch, Recipe, SampleRules, TokenizerRules
from ..shared.flops import head_flops, layer_flops
from .model import BertForPretraining, attention_window
from .samples import collate, open_samples, sample_settings
from .transformers_form import BERT_IN_TRANSFORMERS


def _loss_counts(batch: Batch, objective: ObjectiveConfig) -> dict[str, int]:
    counts = {"mlm": int((batch["masked_labels"] != IGNORED).sum())}
    if objective.sentence_task != "none":
        counts[objective.sentence_task] = len(batch["sentence_labels"])
    return counts


def _flops_per_sample(model: ModelConfig, vocab_size: int, seq_length: float, predictions: float) -> float:
    window = attention_window(model)
    seen = None if window is None else 2 * window + 1
    transform = 6 * predictions * model.hidden_size**2
    return layer_flops(model, seq_length, seen) + transform + head_flops(model, vocab_size, predictions)


BERT = Recipe(
    name="bert",
    build_model=BertForPretraining,
    loss_counts=_loss_counts,
    real_tokens=lambda batch: int(batch["attention_mask"].sum()),
    flops_per_sample=_flops_per_sample,
    tokenizer=TokenizerRules(
        trained="wordpiece",
        specials={"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
        needed=("pad", "cls", "sep", "mask"),
    ),
    samples=SampleRules(layout="sentences", settings=sample_settings, open=open_samples, collate=collate),
    transformers=BERT_IN_TRANSFORMERS,
    command="fill-mask",
)
