"""What a layer keeps for backward."""

import dataclasses

import torch

from xformer_train.kernels import LayerConfig, TransformerLayer

CONFIG = LayerConfig(
    hidden_size=24,
    num_attention_heads=3,
    intermediate_size=40,
    hidden_dropout_prob=0.2,
    attention_probs_dropout_prob=0.2,
    pre_layer_norm=False,
)


def saved_bytes(layer, x):
    total = 0
    parameters = {p.data_ptr() for p in layer.parameters()}
    seen = set()

    def pack(tensor):
        nonlocal total
        storage = tensor.untyped_storage()
        if tensor.data_ptr() not in parameters and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return total


def test_each_memory_flag_drops_the_tensor_it_names():
    x = torch.randn(2, 9, 24, requires_grad=True)
    base = saved_bytes(TransformerLayer(CONFIG), x)
    tokens, float_bytes = 2 * 9, 4

    def saving(**flags):
        return base - saved_bytes(TransformerLayer(dataclasses.replace(CONFIG, **flags)), x)

    assert saving(gelu_checkpoint=True) == tokens * 40 * float_bytes
    assert saving(attn_dropout_checkpoint=True) == 2 * 3 * 9 * 9 * float_bytes
    # Both inputs of the two LayerNorms go, as do their means; the last output is held by the inversion alone.
    assert saving(normalize_invertible=True) == (2 * tokens * 24 - tokens * 24 + 2 * tokens) * float_bytes
