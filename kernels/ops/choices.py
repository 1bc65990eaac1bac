"""Name what callers of ops and layers may choose: the path that computes it, activation, norm, what backward computes again.

No torch import: the sections of the run config offer these choices, and reading one is quick.
"""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
"""The label that counts for nothing."""

Activation = Literal["gelu", "gelu_tanh", "silu", "relu2"]
"""relu2 is relu(x)**2."""

ActivationCheckpointing = Literal["none", "selective", "full"]
Kernels = Literal["auto", "reference"]
Norm = Literal["layer_norm", "rms_norm"]


def uses_triton(tensor: "Tensor", kernels: Kernels) -> bool:
    """Return whether Triton computes an op on this tensor: on CUDA, unless kernels is `reference` or torch.export looks on.

    Raises ValueError if it should and its dtype has no GPU kernel.
    """
    if kernels == "reference" or not tensor.is_cuda:
        return False
    if not (tensor.dtype.is_floating_point and tensor.dtype.itemsize in (2, 4)):
        raise ValueError(
            f"dtype {tensor.dtype} has no GPU kernel; use float32, float16 or bfloat16, or kernels='reference'"
        )
    from torch.compiler import is_exporting

    return not is_exporting()
