"""The linear layer of the tests of FP8 products, one pass of it, and how far FP8 may be from high precision."""

import math

import torch
from torch import nn

from xformer_train.kernels.fp8.linear import Fp8State, fp8_autocast, fp8_linear


def sqnr(expected, actual):
    """Signal to quantisation noise, dB; infinite between equal tensors. They may be on any devices."""
    expected, actual = expected.double().cpu(), actual.double().cpu()
    return 20 * math.log10(expected.norm() / (expected - actual).norm())


class Layer(nn.Module):
    def __init__(self, K, N, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N, K, dtype=dtype) / K**0.5)
        self.bias = nn.Parameter(torch.randn(N, dtype=dtype))
        self.fp8 = Fp8State()

    def forward(self, x, is_first_microbatch=None, main_grad=None):
        options = {"is_first_microbatch": is_first_microbatch, "main_grad": main_grad}
        return fp8_linear(x, self.weight, self.bias, self.fp8, **options)


def results(layer, x, dy, recipe=None, **options):
    """y and the gradients of x, weight and bias, of one pass with FP8 or, without a recipe, in high precision."""
    inputs = (x, layer.weight, layer.bias)
    with fp8_autocast(recipe is not None, fp8_recipe=recipe):
        y = layer(x, **options)
    return y.detach(), *torch.autograd.grad(y, inputs, dy)
