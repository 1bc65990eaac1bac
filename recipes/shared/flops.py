"""Count the operations of what models share."""

from ..config import ModelConfig


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
