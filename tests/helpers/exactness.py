"""How exact a kernel has to be: as torch is in the same dtype, both against the same formula in fp64."""

import torch

# On a GPU our products of fp32 are three of tf32, each off by up to 2**-21 ("tf32x3"), and our powers of two are off by 2**-22
# (ex2.approx, PTX ISA); torch's fp32 rounds by 2**-24. So ours may be 8 times as far off. What a wrong kernel makes is far
# beyond: a single product of tf32 is off by 2**-11.
_FACTOR, _FACTOR_OF_FP32_ON_A_GPU = 2, 8


def allowed_error(torchs, exact, dtype=None, eps=None):
    """Return the norm by which a result may differ from `exact` (fp64): a multiple of torch's own, and as much rounding once.

    torchs: torch's result. dtype: under test, default that of the result. eps: of the one rounding, for where torch makes
    none, default that of the dtype.
    """
    dtype = torchs.dtype if dtype is None else dtype
    factor = _FACTOR_OF_FP32_ON_A_GPU if dtype == torch.float32 and torchs.is_cuda else _FACTOR
    eps = torch.finfo(dtype).eps if eps is None else eps
    return factor * (torchs.double() - exact).norm() + factor / 2 * eps * exact.norm()
