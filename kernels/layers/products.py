"""The matrix products of a layer and the norms in front of them, which FP8 computes differently."""

from typing import Any

from torch import Tensor

from ..ops.mlp.mlp import MlpOptions, mlp_and_input
from ..ops.norm.residual_norm import norm_and_input, residual_add, residual_norm
from ..ops.parallel_linear import ParallelMode, column_parallel_linear, linear_and_input, row_parallel_linear
from ..parallel.collectives import TensorParallel


class Products:
    """Compute the products of one pass of a layer, and the norms in front of them, in the dtype of the hidden states.

    For a pass inside fp8_autocast `Fp8Products` of fp8_products.py takes its place.
    """

    def norm(self, z: Tensor, weight: Tensor, norm_bias: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
        """Return the layer's input again, for the residual stream, and its `norm`, which the QKV projection reads."""
        return norm_and_input(z, weight, norm_bias, **options)

    def residual_norm(self, x: Tensor, *tensors: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Return `residual_norm` of the attention half's output, which the feed-forward half reads."""
        return residual_norm(x, *tensors, **options)

    def residual_add(self, x: Tensor, *tensors: Any, **options: Any) -> Tensor:
        """Return `residual_add` of a half's output, where no norm of ours follows."""
        return residual_add(x, *tensors, **options)

    def project(self, x: Tensor, projection: Any, mode: ParallelMode, parallel: TensorParallel) -> Tensor:
        """Return x through a projection; the bias of a row-parallel one is left to `residual_norm` and `residual_add`."""
        multiply = column_parallel_linear if mode == "column" else row_parallel_linear
        bias = projection.bias if mode == "column" else None
        return multiply(x, projection.weight, bias, parallel.group, sequence_parallel=parallel.sequence)

    def project_and_input(self, x: Tensor, projection: Any, parallel: TensorParallel) -> tuple[Tensor, Tensor]:
        """Return x through a column-parallel projection, and x again for the residual stream."""
        weight, bias, sequence = projection.weight, projection.bias, parallel.sequence
        return linear_and_input(x, weight, bias, parallel.group, sequence_parallel=sequence)

    def mlp(self, x: Tensor, inward: Any, outward: Any, options: MlpOptions) -> tuple[Tensor, Tensor]:
        """Return the feed-forward half of two projections, without the bias of the second, and x for the residual stream."""
        return mlp_and_input(x, inward.weight, inward.bias, outward.weight, options)
