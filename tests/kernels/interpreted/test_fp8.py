"""The cast of fp8_triton.py against quantize_reference.

Triton's interpreter rounds to FP8 wrongly, so every number here is one that FP8 holds. On a GPU, rounding is tested too.
"""

import itertools
import math

import pytest
import torch

from xformer_train.kernels.fp8_products import fp8_path, quantize_reference
from xformer_train.kernels.fp8_triton import quantize

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
