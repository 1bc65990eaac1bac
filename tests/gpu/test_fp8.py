"""Casts to FP8 inside of GELU and behind LayerNorm on a GPU, against separate ones there and against the emulation."""

import pytest
import torch
from helpers.fp8_linear import sqnr

from xformer_train.kernels import TransformerLayer, te
from xformer_train.kernels.fp8 import norm as fp8_norm
from xformer_train.kernels.fp8.linear import (
    DelayedScaling,
    Float8CurrentScaling,
    Fp8State,
    fp8_autocast,
    fp8_linear,
    fp8_path,
)
from xformer_train.kernels.fp8.mlp import fp8_mlp
from xformer_train.kernels.fp8.norm import norm_before
from xformer_train.kernels.layers.config import LayerConfig
from xformer_train.kernels.ops.mlp.activation import activated

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or fp8_path(torch.device("cuda")) != "FP8 products by torch._scaled_mm",
        reason="needs a CUDA device with FP8 products",
    ),
]
RECIPES = {"current": Float8CurrentScaling(), "delayed": DelayedScaling()}


def in_steps(x, w1, b1, w2, activation, state1, state2):
    return fp8_linear(activated(fp8_linear(x, w1, b1, state1), activation), w2, None, state2)


def two_steps(function, tensors, dy, activation, recipe):
    """Output and gradients of the second of two equal steps, whose delayed scales are those of the first."""
    leaves, states = [tensor.clone().requires_grad_() for tensor in tensors], (Fp8State(), Fp8State())
    for _ in range(2):
        with fp8_autocast(fp8_recipe=recipe):
            y = function(*leaves, activation, *states)
        gradients = torch.autograd.grad(y, leaves, dy)
    return y.detach(), *gradients


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("tokens", [2048, 301, 1])
def test_the_fused_half_is_near_its_steps_and_the_emulation(tokens, activation, recipe):
    """Where a last bit is the amax it changes the scale, so 36 dB in theory; FP8 itself keeps 25 to 28."""
    torch.manual_seed(0)
    H, F = 256, 1024
    shapes = ((tokens, H), (F, H), (F,), (H, F), (tokens, H))
    *tensors, dy = (torch.randn(shape, dtype=torch.bfloat16) / shape[-1] ** 0.25 for shape in shapes)
    device = [tensor.cuda() for tensor in tensors]
    ours = two_steps(fp8_mlp, device, dy.cuda(), activation, recipe)
    steps = two_steps(in_steps, device, dy.cuda(), activation, recipe)
    emulated = two_steps(fp8_mlp, tensors, dy, activation, recipe)
    for name, a, b, c in zip(("y", "dx", "dw1", "db1", "dw2"), ours, steps, emulated, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert sqnr(b, a) > 34, name
        assert sqnr(c, a) > 34, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(2048, 1024), (37, 1600), (1, 16)])
def test_the_amax_of_a_norm_is_exact(shape, dtype):
    torch.manual_seed(0)
    x, residual = torch.randn(2, *shape, dtype=dtype, device="cuda")
    bias, weight, norm_bias = torch.randn(3, shape[1], dtype=dtype, device="cuda")
    seed = torch.tensor(3, device="cuda")
    with fp8_autocast():
        _, y, amax = norm_before(Fp8State(), None, None, residual, weight, norm_bias, eps=1e-5)
        assert amax == y.abs().max()
        _, y, amax = norm_before(Fp8State(), x, bias, residual, weight, norm_bias, eps=1e-5, p=0.1, seed=seed, site=2)
        assert amax == y.abs().max()


@pytest.mark.parametrize("make", [
    lambda: TransformerLayer(LayerConfig(256, 4, 1024, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)),
    lambda: te.TransformerLayer(256, 1024, 4, hidden_dropout=0.0, attention_dropout=0.0),
])  # fmt: skip
def test_a_layer_computes_the_same_without_the_hand_over(make, monkeypatch):
    torch.manual_seed(0)
    layer = make().to("cuda", torch.bfloat16)
    x, dy = torch.randn(2, 3, 101, 256, dtype=torch.bfloat16, device="cuda")
    x.requires_grad_()
    results = []
    for _ in range(2):
        with fp8_autocast():
            y = layer(x)
        results.append((y, *torch.autograd.grad(y, (x, *layer.parameters()), dy)))
        monkeypatch.setattr(fp8_norm, "takes_amax", lambda *_: False)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
