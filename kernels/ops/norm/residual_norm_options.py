"""What the ops of residual_norm.py are asked for, and what their backward passes get from their forward passes."""

from typing import NamedTuple

from torch import Tensor

from ...errors import UserError
from ..choices import Kernels, Norm

Gradients = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]


class Options(NamedTuple):
    """What the ops are asked for besides tensors, as a tuple: torch 2.11 cannot trace dataclasses.astuple on Python 3.11.

    p: 0 means no dropout, and then seed is None. inverted: the backward pass gets y instead of z and mean.
    amax: the norm's forward pass gives max |y| as well.
    """

    eps: float
    p: float
    site: int
    inverted: bool
    kernels: Kernels
    amax: bool = False
    kind: Norm = "layer_norm"


class Saved(NamedTuple):
    """What the backward of the norm gets from its forward.

    kept: (T, H), z or, if inverted, y; mean: (T,) or None if inverted and of RMSNorm; rstd: (T,); weight: (H,);
    norm_bias, bias: (H,) or None; seed: int64 scalar or None. mean and rstd are fp32, fp64 for fp64 input.
    """

    kept: Tensor
    mean: Tensor | None
    rstd: Tensor
    weight: Tensor
    norm_bias: Tensor | None
    bias: Tensor | None
    seed: Tensor | None


def make_options(
    eps: float,
    p: float,
    seed: Tensor | None,
    site: int,
    inverted: bool,
    kernels: Kernels,
    kind: Norm = "layer_norm",
) -> Options:
    """Return the options of one call; raises ValueError for a p that is no probability."""
    if not 0 <= p < 1:
        raise UserError(f"p={p} is not a dropout probability; it must be in [0, 1)")
    return Options(eps, 0.0 if seed is None else p, site, inverted, kernels, kind=kind)


def check_shapes(
    x: Tensor | None, bias: Tensor | None, residual: Tensor, weight: Tensor | None, norm_bias: Tensor | None
) -> None:
    """Raise ValueError where x or a vector does not fit residual (..., H)."""
    if x is not None and (x.shape != residual.shape or x.dtype != residual.dtype):
        raise ValueError(
            f"x is {tuple(x.shape)} {x.dtype}, residual is {tuple(residual.shape)} {residual.dtype}; they must be alike"
        )
    for name, vector in (("bias", bias), ("weight", weight), ("norm_bias", norm_bias)):
        if vector is not None and vector.shape != residual.shape[-1:]:
            raise ValueError(
                f"{name} has shape {tuple(vector.shape)}, the last dim of the input is {residual.shape[-1]}"
            )
