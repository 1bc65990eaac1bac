"""What FP8 products ask of torch._scaled_mm: shapes, layouts and dtypes that are legal on a GPU, and there the same numbers."""

import pytest
import torch
from helpers.fp8_linear import Layer, results, sqnr

from xformer_train.kernels.fp8 import products as fp8_products
from xformer_train.kernels.fp8.linear import Float8CurrentScaling, Fp8State, fp8_autocast, fp8_path
from xformer_train.kernels.fp8.mlp import fp8_mlp


def gpu_scaled_mm(a, b, scale_a, scale_b, *, bias, out_dtype, use_fast_accum):
    """torch._scaled_mm with the demands that only a GPU makes."""
    assert a.is_contiguous() and b.t().is_contiguous() and not b.is_contiguous()
    assert a.shape[1] % 16 == 0 and b.shape[0] % 16 == 0 and b.shape[1] % 16 == 0
    assert a.numel() and b.numel() and not (a.dtype == b.dtype == torch.float8_e5m2)
    assert all(scale.numel() == 1 and scale.dtype == torch.float32 for scale in (scale_a, scale_b))
    assert bias is None or (bias.dtype == out_dtype != torch.float32)
    assert use_fast_accum == (a.dtype == b.dtype)  # with HYBRID: in the forward product only
    y = (a.double() * scale_a) @ (b.double() * scale_b)
    return (y if bias is None else y + bias).to(out_dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [48, 37, 1, 0])
def test_what_a_gpu_is_asked_is_legal_there(dtype, tokens, monkeypatch):
    torch.manual_seed(10)
    layer, x = Layer(32, 64), torch.randn(tokens, 32, dtype=dtype, requires_grad=True)
    dy = torch.randn(tokens, 64, dtype=dtype)
    emulated = results(layer, x, dy, Float8CurrentScaling())
    monkeypatch.setattr(fp8_products, "has_scaled_mm", lambda device: True)
    monkeypatch.setattr(fp8_products, "_quantize", fp8_products.quantize_reference)
    monkeypatch.setattr(torch, "_scaled_mm", gpu_scaled_mm)
    for a, b in zip(emulated, results(layer, x, dy, Float8CurrentScaling()), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)  # the last bit


@pytest.mark.parametrize("tokens", [37, 0])
def test_what_the_feed_forward_half_asks_a_gpu_is_legal_there(tokens, monkeypatch):
    torch.manual_seed(11)
    shapes = (tokens, 32), (64, 32), (64,), (32, 64)
    inputs = [(torch.randn(shape) / 4).bfloat16().requires_grad_() for shape in shapes]
    dy, passes = torch.randn(tokens, 32).bfloat16(), []
    for _ in range(2):
        with fp8_autocast():
            y = fp8_mlp(*inputs, "gelu", Fp8State(), Fp8State())
        passes.append((y.detach(), *torch.autograd.grad(y, inputs, dy)))
        monkeypatch.setattr(fp8_products, "has_scaled_mm", lambda device: True)
        monkeypatch.setattr(fp8_products, "_quantize", fp8_products.quantize_reference)
        monkeypatch.setattr(torch, "_scaled_mm", gpu_scaled_mm)
    for a, b in zip(*passes, strict=True):
        assert not tokens or sqnr(a, b) > 34  # where a last bit of a sum is the amax it changes the scale


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [256, 37])
def test_scaled_mm_gives_what_the_emulation_gives(dtype, tokens):
    device = torch.device("cuda")
    if fp8_path(device) != "FP8 products by torch._scaled_mm":
        pytest.skip("this GPU has no FP8")
    torch.manual_seed(9)
    layer, x = Layer(128, 64, dtype), torch.randn(tokens, 128, dtype=dtype, requires_grad=True)
    dy = torch.randn(tokens, 64, dtype=dtype)
    emulated = results(layer, x, dy, Float8CurrentScaling())
    real = results(layer.to(device), x.detach().to(device).requires_grad_(), dy.to(device), Float8CurrentScaling())
    for a, b in zip(emulated, real, strict=True):
        # Hopper's fast accumulation keeps 14 bits of a sum; bf16 results keep 8
        assert sqnr(a, b) > 45
