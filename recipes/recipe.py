"""What a recipe gives to the training loop."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from .config import LayerFlags, ModelConfig, ObjectiveConfig

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """One kind of model with its objective.

    build_model(model, layer, objective, vocab_size): the model; called with a batch's tensors as keyword arguments it
        returns the *sum* of each part of the loss as fp32 scalars, such as {"mlm": ..., "nsp": ...}. The training loss is
        the sum over parts of sum / count, with the counts of the whole step, so that it does not depend on how the step is
        cut into micro-batches and processes.
    loss_counts(batch, objective): how many terms each of those sums has.
    real_tokens(batch): tokens that are not padding.
    flops_per_sample(model, vocab_size, seq_length, predictions): matrix-product FLOPs of forward and backward of one
        sequence (backward counts twice, recomputation not at all), predictions being the positions that reach the head. At
        a mean length it is a lower bound: attention grows with the square.
    """

    build_model: Callable[[ModelConfig, LayerFlags, ObjectiveConfig, int], nn.Module]
    loss_counts: Callable[[Batch, ObjectiveConfig], dict[str, int]]
    real_tokens: Callable[[Batch], int]
    flops_per_sample: Callable[[ModelConfig, int, float, float], float]


def layer_flops(model: ModelConfig, seq_length: float) -> float:
    """Forward and backward FLOPs of all layers for one sequence: 6 S (4 H^2 + 2 H F) + 12 S^2 H each.

    With F = 4 H this is the 72 S H^2 + 12 S^2 H by which DeepSpeed's and NVIDIA's BERT figures are counted; causal attention
    is counted in full, as is usual for GPT.
    """
    size = model.hidden_size
    products = 6 * seq_length * (4 * size**2 + 2 * size * model.intermediate_size)
    return model.num_hidden_layers * (products + 12 * seq_length**2 * size)


def head_flops(model: ModelConfig, vocab_size: int, predictions: float) -> float:
    """Forward and backward FLOPs of the output projection over the vocabulary."""
    return 6 * predictions * model.hidden_size * vocab_size
