"""The precision of rotary position embedding; tests/kernels/te/test_transformer_layer.py has its place in a layer."""

import pytest
import torch

from xformer_train.kernels import te
from xformer_train.kernels.te.rotary import rotate


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [8, 6])
def test_a_turn_is_as_precise_as_its_input(dtype, columns):
    """One rounding at the end: fp64 is no more than some of its last bits away, whatever the dtype of the angles."""
    x = torch.randn(5, 2, 3, 8, dtype=dtype)
    angles = te.RotaryPositionEmbedding(columns)(5)
    wide, half = x.double(), columns // 2
    turns = torch.polar(torch.ones(5, 1, half, dtype=torch.float64), angles[:, 0, :, :half].double())
    turned = torch.complex(wide[..., :half], wide[..., half:columns]) * turns[:, None]
    expected = torch.cat([turned.real, turned.imag, wide[..., columns:]], -1)
    ours = rotate(x, angles)
    assert ours.dtype == dtype
    # fp32: four roundings at most
    torch.testing.assert_close(
        ours.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps
    )
