"""The kernels of fp8/cast_triton.py and mlp_triton.py, and the amax of a norm, against their references.

Triton's interpreter rounds to FP8 wrongly, so every number that is cast here is one that FP8 holds; GELU of other numbers is
cast to fp32, which the kernels take for an FP8 type. On a GPU, rounding is tested too.
"""

import itertools
import math

import pytest
import torch

from xformer_train.kernels.fp8.cast_triton import quantize
from xformer_train.kernels.fp8.mlp import gelu_backward_quantize_reference, gelu_quantize_reference
from xformer_train.kernels.fp8.mlp_triton import gelu_backward_quantize, gelu_quantize
from xformer_train.kernels.fp8.products import fp8_path, quantize_reference
from xformer_train.kernels.ops.norm.residual_norm_options import Options
from xformer_train.kernels.ops.norm.residual_norm_triton import residual_norm_forward

from .conftest import ON_GPU

if ON_GPU and fp8_path(torch.device("cuda")) != "FP8 products by torch._scaled_mm":
    pytest.skip("this GPU has no FP8", allow_module_level=True)

LAYOUTS = ((True, True), (True, False), (False, True))


def assert_same(x, scale, dtype):
    for rows, columns in LAYOUTS:
        ours = quantize(x, scale, None, dtype, rows, columns)
        theirs = quantize_reference(x, scale, None, dtype, rows, columns)
        for a, b in zip(ours, theirs, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype and a.is_contiguous()
            torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("shape", [(70, 160), (16, 16), (1, 272), (129, 32), (0, 48)])
def test_rows_columns_amax_and_scale(dtype, shape):
    torch.manual_seed(sum(shape))
    x = torch.randint(-7, 8, shape).to(torch.bfloat16)
    if x.numel():
        x[-1, -1] = -7  # so that current scaling has a power of two
    for scale in (None, torch.tensor(2.0)):
        assert_same(x, scale, dtype)
    assert_same(x.float().t().contiguous().t(), None, dtype)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_numbers_that_no_scale_can_serve(dtype):
    """Beyond the range, zeros, infinities and NaN."""
    specials = [2.0**30, -(2.0**30), 0.0, math.inf, math.nan]
    if not ON_GPU and dtype == torch.float8_e4m3fn:
        specials.remove(math.nan)  # which the interpreter casts to 384
    for special, scale in itertools.product(specials, (None, torch.tensor(0.5))):
        x = torch.zeros(20, 32)
        x[17, 5] = special
        assert_same(x, scale, dtype)


@pytest.mark.skipif(not ON_GPU, reason="the interpreter rounds to FP8 wrongly")
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_rounding(dtype):
    x = torch.randn(300, 272) * torch.logspace(-6, 3, 272)
    for scale in (None, torch.tensor(3.7)):
        assert_same(x, scale, dtype)
        assert_same(x.bfloat16(), scale, dtype)


def test_a_known_amax_is_taken_without_a_look():
    x, amax = torch.tensor([[1.0, -2.0] * 8] * 3), torch.tensor(4.0)
    ours, theirs = (cast(x, None, amax, torch.float8_e4m3fn, True, True) for cast in (quantize, quantize_reference))
    for i in (0, 1, 3):
        assert torch.equal(ours[i].float(), theirs[i].float())
    assert ours[0].float().max() == 448 / 4 and amax == 4


SHAPES = [(70, 160), (16, 16), (1, 272), (129, 32), (300, 48), (0, 48)]  # more rows than a program of backward has


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("shape", SHAPES)
def test_layouts_of_gelu(shape, activation):
    """Far from 0 GELU is the larger of x and 0 and its slope 1 or 0, so that all numbers are whole."""
    torch.manual_seed(sum(shape))
    f = 16 * (torch.randint(1, 8, shape) * torch.randint(0, 2, shape).mul(2).sub(1)).to(torch.bfloat16)
    da = torch.randint(-7, 8, shape).to(torch.bfloat16)
    if f.numel():
        f[-1, -1], da[-1, -1] = 112, -7  # so that current scaling has a power of two
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    for scale, (rows, columns) in itertools.product((None, torch.tensor(2.0)), LAYOUTS):
        assert_equal(*(cast(f, scale, activation, e4m3, columns) for cast in (gelu_quantize, gelu_quantize_reference)))
        both = gelu_backward_quantize, gelu_backward_quantize_reference
        assert_equal(*(cast(da.clone(), f, scale, activation, e5m2, rows, columns) for cast in both))


def assert_equal(ours, theirs, **tolerance):
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.is_contiguous()
        torch.testing.assert_close(a.float(), b.float(), **tolerance)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_numbers_of_gelu(dtype, activation):
    """fp32 sums of a column differ in order; a result that lies between two fp16 numbers goes either way."""
    torch.manual_seed(0)
    f, da = torch.randn(2, 70, 48).mul(2).to(dtype).unbind()
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-3, "atol": 2e-2}
    for scale in (torch.tensor(2.0), torch.tensor(0.3)):
        both = gelu_quantize, gelu_quantize_reference
        assert_equal(*(cast(f, scale, activation, torch.float32, True) for cast in both), **close)
        both = gelu_backward_quantize, gelu_backward_quantize_reference
        assert_equal(*(cast(da.clone(), f, scale, activation, torch.float32, True, True) for cast in both), **close)


@pytest.mark.parametrize("scale", [None, torch.tensor(1.0)])
@pytest.mark.parametrize("special", [math.inf, math.nan])
def test_gelu_of_what_is_no_number(special, scale):
    f, da = torch.zeros(2, 20, 32).unbind()
    f[17, 5] = special
    assert gelu_quantize(f, scale, "gelu", torch.float8_e5m2, True)[2].isnan() == math.isnan(special)
    da[3, 4] = special
    rows, _, amax, inverse, db1 = gelu_backward_quantize(da, f, scale, "gelu", torch.float8_e5m2, True, True)
    assert not amax.isfinite() and inverse == 1 and not db1[4].isfinite()
    assert rows[3, 4].float().isnan() == math.isnan(special)


@pytest.mark.skipif(not ON_GPU, reason="the interpreter rounds to FP8 wrongly")
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_rounding_of_gelu(activation):
    """Against the cast of what the kernels themselves give in fp32, as a GPU's exp is not a CPU's."""
    f, da = (2 * torch.randn(2, 300, 272)).unbind()
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        one = torch.ones(())
        a = gelu_quantize(f, one, activation, torch.float32, True)[0]
        df = gelu_backward_quantize(da.clone(), f, one, activation, torch.float32, True, True)[0]
        for scale in (None, torch.tensor(3.7)):
            assert_equal(gelu_quantize(f, scale, activation, dtype, True), quantize(a, scale, None, dtype, True, True))
            *ours, _ = gelu_backward_quantize(da.clone(), f, scale, activation, dtype, True, True)
            assert_equal(ours, quantize(df, scale, None, dtype, True, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (1000, 63), (7, 1600), (0, 32)])
def test_the_amax_of_a_norm_is_that_of_what_it_stores(shape, dtype):
    """The bias of the norm is larger than anything else, so that rows and columns beyond the edge would be seen."""
    torch.manual_seed(sum(shape))
    x, residual, vector = (
        torch.randn(shape, dtype=dtype),
        torch.randn(shape, dtype=dtype),
        torch.rand(shape[1]).to(dtype),
    )
    norm_bias, options = torch.full_like(vector, -9), Options(1e-5, 0.3, 2, False, "auto")
    for added, bias, seed in ((x, vector, torch.tensor(5)), (x, None, None), (None, None, None)):
        amax = torch.zeros(())
        ours = residual_norm_forward(added, bias, residual, vector, norm_bias, seed, options, amax)
        assert_equal(ours, residual_norm_forward(added, bias, residual, vector, norm_bias, seed, options))
        assert amax == (ours[1].abs().max().float() if residual.numel() else 0)
    if residual.numel():
        residual[-1, -1] = math.nan
        residual_norm_forward(None, None, residual, vector, norm_bias, None, options, amax)
        assert amax.isnan()
