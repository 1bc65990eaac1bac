"""Norms in front of FP8 products: with current scaling they give the amax of their output, which saves the cast a pass."""

from torch import Tensor

from ..ops.choices import Kernels, Norm
from ..ops.norm.residual_norm import sum_norm_and_amax
from ..ops.norm.residual_norm_options import make_options
from .linear import Fp8State, takes_amax


def norm_before(  # noqa: PLR0913 - as residual_norm
    state: Fp8State | None,
    x: Tensor | None,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor | None,
    *,
    eps: float,
    p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    invertible: bool = False,
    kernels: Kernels = "auto",
    kind: Norm = "layer_norm",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return z and y of `residual_norm`, and max |y|, (), fp32, where the next product makes use of it: see `takes_amax`.

    state: of the next product, None if it never takes FP8 operands. x: None for the `norm` of residual, which is then z.
    """
    options = make_options(eps, p, seed, site, invertible, kernels, kind)
    if state is not None and takes_amax(state, residual.device):
        options = options._replace(amax=True)
    return sum_norm_and_amax(x, bias, residual, weight, norm_bias, seed, options)
