"""A stack of layers against the layers one by one."""

import dataclasses

import pytest
import torch

from xformer_train.kernels import AttentionMask, LayerConfig, LayerStack, layer
from xformer_train.kernels.dropout import draw_seed

CONFIG = LayerConfig(24, 3, 40, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2, initializer_range=0.3)
MASK = AttentionMask(causal=True)


@pytest.mark.parametrize("drops", [True, False])
def test_a_stack_is_its_layers_in_order_each_with_a_seed_of_its_own(drops):
    stack, x = LayerStack(CONFIG, 3).train(drops), torch.randn(2, 9, 24)
    torch.manual_seed(5)
    y = stack(x, MASK)
    torch.manual_seed(5)
    seeds = draw_seed(x.device, (3,)).unbind()
    assert len({int(seed) for seed in seeds}) == 3
    hidden = x
    for one, seed in zip(stack, seeds, strict=True):
        hidden = one(hidden, MASK, seed=seed)
    assert torch.equal(y, hidden)
    assert next(iter(stack.state_dict())) == "0.attention_norm.weight"


@pytest.mark.parametrize("training", [True, False])
def test_a_stack_asks_once_which_norms_may_be_inverted(training, monkeypatch):
    """The answer makes the host wait for a GPU."""
    asked = []

    def are_invertible(weights, biases, dtype):
        asked.append((len(weights), len(biases), dtype))
        return [True] * len(weights)

    monkeypatch.setattr(layer, "are_invertible", are_invertible)
    stack = LayerStack(dataclasses.replace(CONFIG, normalize_invertible=True), 3)
    with torch.set_grad_enabled(training):
        stack(torch.randn(2, 9, 24), MASK)
    assert asked == ([(6, 6, torch.float32)] if training else [])


def test_a_cuda_graph_is_no_matter_without_a_gpu():
    stack = LayerStack(CONFIG, 2, cuda_graph=True)
    x = torch.randn(2, 9, 24, requires_grad=True)
    stack(x, MASK).sum().backward()
    assert x.grad is not None
