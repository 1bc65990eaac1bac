"""LayerNorms in front of FP8 products: with current scaling they give the amax of their output, which saves the cast a pass."""

from dataclasses import replace

from torch import Tensor

from ..ops.choices import Kernels
from ..ops.norm.residual_norm import NormFunction, ResidualNormFunction
from ..ops.norm.residual_norm_options import check_shapes, make_options
from .linear import Fp8State, takes_amax


def norm_before(
    state: Fp8State | None,
    z: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: float,
    invertible: bool = False,
    kernels: Kernels = "auto",
) -> tuple[Tensor, Tensor | None]:
    """`norm` of z, and max |norm|, (), fp32, where the product behind makes use of it: see `takes_amax`.

    state: of that product; None: it never takes FP8 operands.
    """
    check_shapes(None, None, z, weight, norm_bias)
    asked = state is not None and takes_amax(state, z.device)
    options = replace(make_options(eps, 0.0, None, 0, invertible, kernels), amax=asked)
    result = NormFunction.apply(z, weight, norm_bias, options)  # type: ignore[no-untyped-call]
    return result if asked else (result, None)


def residual_norm_before(  # noqa: PLR0913 - as residual_norm
    state: Fp8State | None,
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: float,
    p: float,
    seed: Tensor | None,
    site: int,
    invertible: bool = False,
    kernels: Kernels = "auto",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """z and y of `residual_norm`, and max |y|, (), fp32, as `norm_before` gives it."""
    check_shapes(x, bias, residual, weight, norm_bias)
    asked = state is not None and takes_amax(state, residual.device)
    options = replace(make_options(eps, p, seed, site, invertible, kernels), amax=asked)
    seed = seed if options.p > 0 else None
    results = ResidualNormFunction.apply(x, bias, residual, weight, norm_bias, seed, options)  # type: ignore[no-untyped-call]
    return results if asked else (*results, None)
