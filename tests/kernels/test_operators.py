"""Every op as an operator of torch.library: what traces rely on, on the CPU path and on the GPU path without a GPU."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from xformer_train.kernels import AttentionMask, LayerConfig, TransformerLayer, cross_entropy  # noqa: F401

T, H, F, V = 5, 8, 12, 7
OPTIONS = (1e-5, 0.3, 2, False, "auto")  # eps, p, site, inverted, kernels
NO_DROPOUT = (1e-5, 0.0, 2, False, "auto")


def rows(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype)


def cases():
    """(operator's name, arguments)"""
    seed, vector = torch.tensor(3), rows(H)
    z, statistic = rows(T, H), rows(T).abs()
    yield "residual_norm_forward", (rows(T, H), vector, z, vector, vector, seed, *OPTIONS)
    yield "residual_norm_forward", (None, None, z, vector, vector, None, *NO_DROPOUT)
    half = rows(T, H, dtype=torch.bfloat16)
    yield "residual_norm_forward", (half, None, half, vector.bfloat16(), vector.bfloat16(), seed, *OPTIONS)
    yield "residual_norm_backward", (z, z, z, statistic, statistic, vector, vector, vector, seed, *OPTIONS)
    yield "residual_norm_backward", (None, z, z, statistic, statistic, vector, vector, None, None, *NO_DROPOUT)
    inverted = (1e-5, 0.3, 2, True, "auto")
    yield "residual_norm_backward", (z, z, z, None, statistic, vector, vector, vector, seed, *inverted)
    for bias in (vector, None):
        yield "residual_add_forward", (z, bias, rows(T, H), seed, *OPTIONS)
        yield "residual_add_backward", (z, bias, seed, *OPTIONS)
    yield "residual_add_backward", (z, vector, None, *NO_DROPOUT)
    for activation in ("gelu", "gelu_tanh"):
        yield "gelu_forward", (rows(T, F), activation, "auto")
        for recompute in (False, True):
            yield "gelu_backward_", (rows(T, F), rows(T, F), activation, recompute, "auto")
    labels = torch.tensor([0, 6, -100, 3, 3])
    for dtype in (torch.float32, torch.bfloat16):
        yield "softmax_loss_", (rows(T, V, dtype=dtype), labels, "auto")


@pytest.mark.parametrize(("name", "arguments"), list(cases()))
def test_operators_keep_torchs_rules(name, arguments):
    """Schema (what is overwritten, nothing shared) and fake results of every operator."""
    operator = getattr(torch.ops.xformer_train, name).default
    torch.library.opcheck(
        operator, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    )
