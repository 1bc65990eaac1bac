"""The GPU kernels as operators of torch.library: their rules, and the layer traced over them."""

import dataclasses

import pytest
import torch

from xformer_train.kernels import AttentionMask, LayerConfig, TransformerLayer, attention, mlp, residual_norm

CONFIG = LayerConfig(16, 2, 24, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2, initializer_range=0.3)


@pytest.fixture(autouse=True)
def _on_triton(monkeypatch):
    for module in (attention, mlp, residual_norm):
        monkeypatch.setattr(module, "uses_triton", lambda *_: True)


def test_the_kernels_of_a_layer_keep_torchs_rules():
    seed, vector, x = torch.tensor(3), torch.rand(8), torch.randn(5, 8)
    statistic, options = torch.rand(5), (1e-5, 0.3, 2, False, "auto")
    qkv, borders = torch.randn(6, 3, 2, 16), torch.tensor([0, 2, 6], dtype=torch.int32)
    out, lse = torch.ops.xformer_train.attention_forward(qkv, None, None, borders, seed, 4, True, 0.3, 1)
    for name, arguments in (
        ("residual_norm_forward", (x, vector, x + 1, vector, vector, seed, *options)),
        ("residual_norm_backward", (x, x, x, statistic, statistic, vector, vector, vector, seed, *options)),
        ("residual_add_forward", (x, vector, x + 1, seed, *options)),
        ("residual_add_backward", (x, vector, seed, *options)),
        ("gelu_forward", (x, "gelu", "auto")),
        ("gelu_backward_", (x.clone(), x, "gelu", True, "auto")),
        ("attention_forward", (qkv, None, None, borders, seed, 4, True, 0.3, 1)),
        ("attention_backward", (out, qkv, out, lse, None, None, borders, seed, 4, True, 0.3, 1, False)),
    ):
        operator = getattr(torch.ops.xformer_train, name).default
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("pre_layer_norm", [True, False])
def test_a_layer_compiles_into_one_graph_over_the_kernels(pre_layer_norm):
    """aot_eager runs the traced graph with the same kernels, so the bits agree, masks of dropout included."""
    config = dataclasses.replace(CONFIG, pre_layer_norm=pre_layer_norm, gelu_checkpoint=True)
    torch.manual_seed(3)
    layer, x, mask = TransformerLayer(config), torch.randn(2, 9, 16), AttentionMask(causal=True)
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(11)
        leaf = x.clone().requires_grad_()
        y = run(leaf, mask)
        results.append((y, *torch.autograd.grad(y, [leaf, *layer.parameters()], torch.ones_like(y))))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)
