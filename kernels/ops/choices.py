"""Name what callers of an op may choose: the path that computes it, the activation, the label that counts for nothing."""

from typing import Literal

import torch
from torch import Tensor

IGNORED = -100


Activation = Literal["gelu", "gelu_tanh"]


Kernels = Literal["auto", "reference"]


_GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def uses_triton(tensor: Tensor, kernels: Kernels) -> bool:
    """Whether Triton computes an op on this tensor: on CUDA, unless kernels is `reference`.

    Raises ValueError if it should and its dtype has no GPU kernel.
    """
    if kernels == "reference" or not tensor.is_cuda:
        return False
    if tensor.dtype not in _GPU_DTYPES:
        raise ValueError(
            f"dtype {tensor.dtype} has no GPU kernel; use float32, float16 or bfloat16, or kernels='reference'"
        )
    return True
