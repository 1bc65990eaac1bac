"""The products of a layer, x @ weight.T + bias: in high precision or FP8, by one process or shared by several.

A product is `column` when each process makes its part of the output features, `row` when each has its part of the input
features and the results are added up, None when it is not shared. kernels/parallel/collectives.py has shapes and collectives.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from ..fp8.linear import Fp8State, fp8_linear, is_fp8_enabled
from ..fp8.mlp import MainGrads, fp8_mlp
from ..ops.choices import Activation
from ..ops.linear import linear
from ..ops.parallel_linear import column_parallel_linear, row_parallel_linear
from ..parallel.collectives import (
    TensorParallel,
    copy_to_group,
    gather_from_sequence,
    reduce_from_group,
    reduce_scatter_to_sequence,
)

ParallelMode = Literal["column", "row"]


class Projection(nn.Linear):
    """The parameters of one product and the state of its FP8 casts, which is in the state dict once DelayedScaling was used."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.fp8 = Fp8State()


def runs_fp8(fp8: Fp8State, device: torch.device) -> bool:
    """Whether a product that starts now may have FP8 operands, as one that is computed again in backward had them."""
    return is_fp8_enabled() if torch.compiler.is_compiling() else fp8.begin(device) is not None


def project(  # noqa: PLR0913 - of a product in high precision, in FP8 and over processes
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    fp8: Fp8State | None,
    mode: ParallelMode | None,
    parallel: TensorParallel,
    *,
    is_first_microbatch: bool | None = None,
    main_grad: Tensor | None = None,
    amax: Tensor | None = None,
) -> Tensor:
    """x @ weight.T + bias, (..., N) in the dtype of x, with FP8 products where fp8_autocast says so.

    x: (..., K); weight: (N, K), this process's shard; bias: (N,) or None. Outside of FP8 regions they have one dtype. With
    parallel.sequence the part of x or of the result that is not sharded by its features is this process's part along dim 0, and
    the gradient of a row-parallel bias is that part's: see `sum_gradient_over`.
    fp8: of this product; None: it never takes FP8 operands. is_first_microbatch, main_grad, amax: of FP8 products, see
    `fp8_linear`. Raises ValueError for shapes that do not fit.
    """
    group, sequence = parallel.group, parallel.sequence
    if fp8 is None or not runs_fp8(fp8, x.device):
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
    b1: Tensor,
    w2: Tensor,
    activation: Activation,
    fp8: tuple[Fp8State, Fp8State],
    parallel: TensorParallel,
    *,
    is_first_microbatch: bool | None = None,
    main_grads: MainGrads = (None, None),
    amax: Tensor | None = None,
) -> Tensor:
    """GELU(x @ w1.T + b1) @ w2.T by `fp8_mlp`, in the shape and dtype of x: a column-parallel product and a row-parallel one.

    w1: (F/t, H), b1: (F/t,), w2: (H, F/t), this process's shards. fp8: of the two products. amax: of x.
    """
    x, amax = _all_tokens(x, amax, parallel)
    out = fp8_mlp(
        x,
        w1,
        b1,
        w2,
        activation,
        *fp8,
        is_first_microbatch=is_first_microbatch,
        main_grads=main_grads,
        amax=amax,
    )
    return _summed(out, parallel)


def _all_tokens(x: Tensor, amax: Tensor | None, parallel: TensorParallel) -> tuple[Tensor, Tensor | None]:
    """What a column-parallel product reads, with its amax if that of this process's x is the whole's."""
    if parallel.sequence:
        return gather_from_sequence(x, parallel.group), None if parallel.divides_tokens else amax
    return copy_to_group(x, parallel.group), amax


def _summed(out: Tensor, parallel: TensorParallel) -> Tensor:
    """What the processes' results of a row-parallel product add up to."""
    return (reduce_scatter_to_sequence if parallel.sequence else reduce_from_group)(out, parallel.group)
