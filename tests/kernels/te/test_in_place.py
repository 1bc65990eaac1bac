"""What modules return may be changed in place, as that of torch's modules, and gradients stay right."""

import pytest
import torch
from torch import nn

from xformer_train.kernels import (
    DeepSpeedTransformerConfig,
    DeepSpeedTransformerLayer,
    LayerConfig,
    LayerStack,
    TransformerLayer,
    te,
)
from xformer_train.kernels.ops.attention.attention import AttentionMask
from xformer_train.kernels.ops.linear import CpuLibraries, available_cpu_libraries, using_cpu_libraries
from xformer_train.kernels.ops.loss.vocab_parallel import vocab_parallel_embedding


def ours(**options):
    return LayerConfig(hidden_size=32, num_attention_heads=4, intermediate_size=64, **options)


DROPPING = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
DEEPSPEED = DeepSpeedTransformerConfig(
    hidden_size=32,
    heads=4,
    num_hidden_layers=2,
    initializer_range=0.02,
    attn_dropout_ratio=0.1,
    hidden_dropout_ratio=0.1,
)
MODULES = {
    "Linear": lambda: te.Linear(32, 32),
    "LayerNorm": lambda: te.LayerNorm(32),
    "RMSNorm": lambda: te.RMSNorm(32),
    "LayerNormLinear": lambda: te.LayerNormLinear(32, 32, return_layernorm_output=True, return_bias=True),
    "RMSNormLinear": lambda: te.LayerNormLinear(32, 32, bias=False, normalization="RMSNorm"),
    "LayerNormMLP": lambda: te.LayerNormMLP(32, 64),
    "without bias": lambda: te.LayerNormMLP(32, 64, bias=False, return_bias=True, return_layernorm_output=True),
    "gated": lambda: te.LayerNormMLP(32, 64, activation="swiglu"),
    "layer": lambda: te.TransformerLayer(32, 64, 4),
    "layer without dropout": lambda: te.TransformerLayer(32, 64, 4, **DROPPING),
    "layer with a last norm": lambda: te.TransformerLayer(32, 64, 4, output_layernorm=True),
    "drop path": lambda: te.TransformerLayer(32, 64, 4, drop_path_rate=0.5),
    "ours": lambda: TransformerLayer(ours()),
    "post-LN": lambda: TransformerLayer(ours(pre_layer_norm=False, gelu_checkpoint=True)),
    "stack": lambda: Stack("none"),
    "full checkpointing": lambda: Stack("full"),
    "DeepSpeed's": lambda: DeepSpeedTransformerLayer(DEEPSPEED),
    "checkpoint": lambda: Checkpoint(True),
    "checkpoint, not reentrant": lambda: Checkpoint(False),
}


class Stack(LayerStack):
    def __init__(self, recomputed):
        super().__init__(ours(), 2, activation_checkpointing=recomputed)

    def forward(self, x):
        return super().forward(x, AttentionMask())


class Checkpoint(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.layer, self.reentrant = te.LayerNormMLP(32, 64), reentrant

    def forward(self, x):
        return te.checkpoint(self.layer, x, use_reentrant=self.reentrant)


def gradients(module, x, change, count):
    """Those of x and the parameters where the results, but for parameters among them, are changed."""
    torch.manual_seed(1)
    leaf = x.detach().clone().requires_grad_()
    results = module(leaf)
    results = results if isinstance(results, tuple) else (results,)
    changed = [change(y) for y in results[:count] if isinstance(y, torch.Tensor) and not isinstance(y, nn.Parameter)]
    weights = torch.arange(32.0)
    loss = sum((y * weights).square().sum() for y in changed)
    module.zero_grad()
    loss.backward()
    return changed, [leaf.grad, *(parameter.grad for parameter in module.parameters())]


def added(y):
    y += 0.5
    return y.mul_(torch.linspace(0.1, 2, 32))


@pytest.mark.parametrize("recipe", [None, te.Float8CurrentScaling()], ids=["high precision", "fp8"])
@pytest.mark.parametrize("library", available_cpu_libraries())
@pytest.mark.parametrize("name", MODULES)
def test_results_may_be_changed_in_place(name, library, recipe):
    """The normalized input that some return too is kept for backward: torch says so there, in place of wrong gradients."""
    torch.manual_seed(0)
    module, x = MODULES[name](), torch.randn(5, 2, 32)
    precision = te.fp8_autocast(enabled=recipe is not None, fp8_recipe=recipe)
    with using_cpu_libraries(CpuLibraries(library, library)), precision:
        found = gradients(module, x, added, 1)
        expected = gradients(module, x, lambda y: (y + 0.5) * torch.linspace(0.1, 2, 32), 1)
        several = isinstance(module(x), tuple)
        if several and recipe is None:
            with pytest.raises(RuntimeError, match="inplace"):
                gradients(module, x, added, 9)
    for pair in zip(found, expected, strict=True):
        for ours, theirs in zip(*pair, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_a_sequence_with_an_inplace_activation_trains():
    model = nn.Sequential(
        te.Linear(32, 16), nn.ReLU(inplace=True), te.LayerNormMLP(16, 32), nn.Dropout(0.5, inplace=True)
    )
    model(torch.randn(5, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_embedded_tokens_may_be_changed_in_place():
    weight = torch.randn(7, 4, requires_grad=True)
    y = vocab_parallel_embedding(torch.tensor([[1, 2]]), weight, None)
    y += 1
    y.sum().backward()
    assert weight.grad.sum() == 8


@pytest.mark.parametrize("name", ["Linear", "LayerNorm", "LayerNormMLP", "layer without dropout", "ours"])
def test_results_may_be_changed_in_place_in_a_trace(name):
    torch.compiler.reset()
    torch.manual_seed(0)
    module, x = MODULES[name]().eval(), torch.randn(5, 2, 32)
    expected = gradients(module, x, added, 1)
    whole = torch.compile(lambda x: added(module(x)), fullgraph=True, backend="aot_eager")
    leaf = x.clone().requires_grad_()
    y = whole(leaf)
    torch.testing.assert_close(y, expected[0][0])
    (y * torch.arange(32.0)).square().sum().backward()
    torch.testing.assert_close(leaf.grad, expected[1][0])
