"""The products of a layer for the few tokens of one step of generation."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..ops.mlp.activation import activated
from ..ops.mlp.mlp import MlpOptions
from ..ops.norm.row_norms import layer_norm, rms_norm
from .products import Products


class TokenProducts(Products):
    """Compute with torch's operators alone, on a CPU, without gradients, dropout or other processes.

    Of one token a fused op takes longer to call than to run, and oneDNN longer to lay out a weight than to multiply by it.
    """

    def norm(self, z: Tensor, weight: Tensor, norm_bias: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
        if options["kind"] == "rms_norm":
            return z, rms_norm(z, weight, options["eps"])[0]
        return z, layer_norm(z, weight, norm_bias, options["eps"])[0]

    def residual_norm(
        self, x: Tensor, bias: Tensor | None, residual: Tensor, *affine: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        return self.norm(self.residual_add(x, bias, residual), *affine, **options)

    def residual_add(self, x: Tensor, bias: Tensor | None, residual: Tensor, **_: Any) -> Tensor:
        return (x if bias is None else x + bias) + residual

    def project(self, x: Tensor, projection: Any, mode: str, *_: Any) -> Tensor:
        return F.linear(x, projection.weight, projection.bias if mode == "column" else None)

    def project_and_input(self, x: Tensor, projection: Any, *_: Any) -> tuple[Tensor, Tensor]:
        return self.project(x, projection, "column"), x

    def mlp(self, x: Tensor, inward: Any, outward: Any, options: MlpOptions) -> tuple[Tensor, Tensor]:
        f = F.linear(x, inward.weight, inward.bias)
        a = activated(f, options.activation, gated=options.gated, kernels=options.kernels)
        return F.linear(a, outward.weight), x
