"""LayerNorms in front of FP8 products: with current scaling they give the amax of their output, which saves the cast a pass."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.choices import Kernels, uses_triton
from ..ops.norm.residual_norm import (
    FORWARD_SCHEMA,
    fake_norm_forward,
    forward_and_save,
    norm,
    norm_gradients,
    residual_norm,
    residual_norm_forward_reference,
)
from ..ops.norm.residual_norm_options import Options, check_shapes, make_options
from ..ops.operator import operator
from .linear import Fp8State, takes_amax
from .products import largest_magnitude


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
    """Return `norm` of z, and max |norm|, (), fp32, where the next product makes use of it: see `takes_amax`.

    state: of the next product, None if it never takes FP8 operands.
    """
    if state is None or not takes_amax(state, z.device):
        return norm(z, weight, norm_bias, eps=eps, invertible=invertible, kernels=kernels), None
    check_shapes(None, None, z, weight, norm_bias)
    options = make_options(eps, 0.0, None, 0, invertible, kernels)
    return _NormWithAmax.apply(None, None, z, weight, norm_bias, None, options)  # type: ignore[no-any-return, no-untyped-call]


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
    """Return z and y of `residual_norm`, and max |y|, (), fp32, where the next product makes use of it, as `norm_before`."""
    if state is None or not takes_amax(state, residual.device):
        given: dict[str, Any] = {
            "eps": eps,
            "p": p,
            "seed": seed,
            "site": site,
            "invertible": invertible,
            "kernels": kernels,
        }
        return *residual_norm(x, bias, residual, weight, norm_bias, **given), None
    check_shapes(x, bias, residual, weight, norm_bias)
    options = make_options(eps, p, seed, site, invertible, kernels)
    seed = seed if options.p > 0 else None
    return _NormWithAmax.apply(x, bias, residual, weight, norm_bias, seed, options)  # type: ignore[no-any-return, no-untyped-call]


def norm_forward_with_amax_reference(
    x: Tensor | None, bias: Tensor | None, residual: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """Return what `residual_norm_forward_reference` gives, and max |y|, (), fp32."""
    z, y, mean, rstd = residual_norm_forward_reference(x, bias, residual, *rest)
    return z, y, mean, rstd, largest_magnitude(y)


@operator(
    f"fp8_norm_forward{FORWARD_SCHEMA}(Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda x, bias, residual, *rest: (
        *fake_norm_forward(x, bias, residual),
        residual.new_empty((), dtype=torch.float32),
    ),
)
def _norm_forward_with_amax(x: Tensor | None, bias: Tensor | None, residual: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Return z, y, mean, rstd and max |y|; without x, z is empty."""
    weight, norm_bias, seed, *values = rest
    options = Options(*values)
    if uses_triton(residual, options.kernels):
        from .norm_triton import norm_forward_with_amax as forward
    else:
        forward = norm_forward_with_amax_reference
    z, *others = forward(x, bias, residual, weight, norm_bias, seed, options)
    return residual.new_empty(0) if x is None else z, *others


class _NormWithAmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        *outputs, amax = forward_and_save(ctx, _norm_forward_with_amax, *arguments)
        ctx.mark_non_differentiable(amax)
        return *outputs, amax

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return norm_gradients(ctx, *gradients[:-1])
