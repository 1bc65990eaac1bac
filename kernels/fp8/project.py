"""FP8 products that several processes share, or that one computes, and what they are outside of FP8 regions.

A product is `column` when each process makes its part of the output features, `row` when each has its part of the input
features and the results are added up, None when it is not shared. kernels/parallel/collectives.py has shapes and collectives.
"""

from typing import Any

import torch
from torch import Tensor

from ..ops.choices import Activation
from ..ops.linear import linear
from ..ops.parallel_linear import ParallelMode, column_parallel_linear, row_parallel_linear
from ..parallel.collectives import (
    TensorParallel,
    copy_to_group,
    gather_from_sequence,
    reduce_from_group,
    reduce_scatter_to_sequence,
)
from .linear import Fp8State, fp8_linear, is_fp8_enabled
from .mlp import MainGrads, fp8_mlp


def runs_fp8(fp8: Fp8State, device: torch.device) -> bool:
    """Return whether a product that starts now may have FP8 operands; a recomputation may where its first pass might."""
    return is_fp8_enabled() if torch.compiler.is_compiling() else fp8.begin(device) is not None


def project(  # noqa: PLR0913 - of a product in high precision, in FP8 and over processes
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    fp8: Fp8State,
    mode: ParallelMode | None,
    parallel: TensorParallel,
    *,
    is_first_microbatch: bool | None = None,
    main_grad: Tensor | None = None,
    amax: Tensor | None = None,
) -> Tensor:
    """Return x @ weight.T + bias, (..., N) in the dtype of x, with FP8 products where fp8_autocast says so.

    x: (..., K); weight: (N, K), this process's shard; bias: (N,) or None. Outside of FP8 regions they have one dtype. With
    parallel.sequence the part of x or of the result that is not sharded by its features is this process's part along dim 0, and
    the gradient of a row-parallel bias is that part's: see `sum_gradient_over`.
    fp8: the state of this product. is_first_microbatch, main_grad, amax: see `fp8_linear`; outside of FP8 regions they change
    nothing. Raises ValueError for shapes that do not fit.
    """
    group, sequence = parallel.group, parallel.sequence
    if not runs_fp8(fp8, x.device):
        if mode is None:
            return linear(x, weight, bias)
        multiply = column_parallel_linear if mode == "column" else row_parallel_linear
        return multiply(x, weight, bias, group, sequence_parallel=sequence)
    if mode == "column":
        x, amax = _all_tokens(x, amax, parallel)
    added = bias if mode != "row" else None
    out = fp8_linear(x, weight, added, fp8, is_first_microbatch=is_first_microbatch, main_grad=main_grad, amax=amax)
    if mode != "row":
        return out
    out = _summed(out, parallel)
    return out if bias is None else out + bias.to(out.dtype)  # behind the sum, or it would be added t times


def project_mlp(  # noqa: PLR0913 - as fp8_mlp
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    activation: Activation,
    fp8: tuple[Fp8State, Fp8State],
    parallel: TensorParallel,
    *,
    gated: bool = False,
    is_first_microbatch: bool | None = None,
    main_grads: MainGrads = (None, None),
    amax: Tensor | None = None,
) -> Tensor:
    """Return act(x @ w1.T + b1) @ w2.T by `fp8_mlp`, in the shape and dtype of x.

    The first product is column-parallel, the second row-parallel. w1: (F/t, H), gated (2F/t, H), b1: as many or None,
    w2: (H, F/t), this process's parts.
    fp8: the states of the two products. The other arguments are those of `fp8_mlp`.
    """
    x, amax = _all_tokens(x, amax, parallel)
    options: dict[str, Any] = {"is_first_microbatch": is_first_microbatch, "main_grads": main_grads, "amax": amax}
    out = fp8_mlp(x, w1, b1, w2, activation, *fp8, gated=gated, **options)
    return _summed(out, parallel)


def _all_tokens(x: Tensor, amax: Tensor | None, parallel: TensorParallel) -> tuple[Tensor, Tensor | None]:
    """Return what a column-parallel product reads, and its amax where this process's x is all of it."""
    if parallel.sequence:
        return gather_from_sequence(x, parallel.group), None if parallel.divides_tokens else amax
    return copy_to_group(x, parallel.group), amax


def _summed(out: Tensor, parallel: TensorParallel) -> Tensor:
    """Return the sum of the processes' results of a row-parallel product."""
    return (reduce_scatter_to_sequence if parallel.sequence else reduce_from_group)(out, parallel.group)
