"""GPU kernel of norm.py: the forward pass of ops/norm with the amax of its output."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.dropout_triton import SEED
from ..ops.norm.residual_norm_triton import NUMBERS, launch_norm_forward, load_vectors, norm_tile
from .cast_triton import magnitude_bits, raise_amax


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=SEED)
def _norm_amax_kernel(
    x_ptr,  # as in _norm_forward_kernel, down to scale
    bias_ptr,
    residual_ptr,
    weight_ptr,
    norm_bias_ptr,
    z_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    seed_ptr,
    num_rows,
    tiles,
    eps,
    site,
    threshold,
    scale,
    amax_ptr,  # () fp32 out, and zero before
    H: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_X: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPS: tl.constexpr,
):
    bias, weight, norm_bias = load_vectors(bias_ptr, weight_ptr, norm_bias_ptr, H, COLUMNS, HAS_BIAS)
    seed = tl.load(seed_ptr) if DROPS else 0
    largest = tl.zeros((ROWS, COLUMNS), tl.int32)
    first = tl.program_id(0) * tiles
    for tile in range(first, first + tiles):
        y, valid = norm_tile(
            x_ptr, bias, residual_ptr, weight, norm_bias, z_ptr, y_ptr, mean_ptr, rstd_ptr, seed,
            tile, num_rows, eps, site, threshold, scale, H, ROWS, COLUMNS, HAS_X, DROPS,
        )  # fmt: skip
        largest = tl.maximum(largest, magnitude_bits(tl.where(valid, y.to(tl.float32), 0.0)))
    raise_amax(amax_ptr, tl.max(largest))


def norm_forward_with_amax(x: Tensor | None, bias: Tensor | None, residual: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Compute what `norm_forward_with_amax_reference` does."""
    amax = residual.new_zeros((), dtype=torch.float32)
    return *launch_norm_forward(_norm_amax_kernel, x, bias, residual, *rest, amax_ptr=amax), amax
