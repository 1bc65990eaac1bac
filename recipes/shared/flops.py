"""Count the operations of what models share."""

import math

from ..config import ModelConfig


def layer_flops(model: ModelConfig, seq_length: float, seen: int | None) -> float:
    """Forward and backward FLOPs of all layers for one sequence, of matrix products alone.

    seen: tokens in the window of a local layer; None where all layers are global.
    With F = 4 H and classic layers this is the 72 S H^2 + 12 S^2 H each by which DeepSpeed's and NVIDIA's BERT figures are
    counted; causal attention is counted in full, as is usual for GPT, and a window as wide wherever it stands.
    """
    size, queries = model.hidden_size, model.num_attention_heads * model.head_size
    keys_and_values = 2 * model.key_heads * model.head_size
    attention = size * (2 * queries + keys_and_values)  # qkv and the output of attention
    mlp = (3 if model.gated_mlp else 2) * size * model.intermediate_size
    every = model.global_attn_every_n_layers
    depth = model.num_hidden_layers
    products = 6 * seq_length * (attention + mlp)
    local = 0 if seen is None else depth - (0 if every is None else math.ceil(depth / every))
    pairs = (depth - local) * seq_length**2 + local * seq_length * min(seq_length, seen or 0)
    return depth * products + 12 * pairs * queries


def head_flops(model: ModelConfig, vocab_size: int, predictions: float) -> float:
    """Forward and backward FLOPs of the output projection over the vocabulary."""
    return 6 * predictions * model.hidden_size * vocab_size
