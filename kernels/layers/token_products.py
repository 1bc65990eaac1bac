"""The products of a layer for the few tokens of one step of generation."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..ops.mlp.activation import activated
from ..ops.mlp.mlp import MlpOptions
from .products import Products


class TokenProducts(Products):
    """Compute with torch's operators alone, on a CPU, without gradients, dropout or other processes.

    Of one token a fused op takes longer to call than to run, and oneDNN longer to lay out a weight than to multiply by it.
    """

    def norm(self, z: Tensor, weight: Tensor, norm_bias: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
        wide = z.to(weight.dtype)  # norms may be in fp32 in a model of half precision
        if options["kind"] == "rms_norm":
            y = F.rms_norm(wide, weight.shape, weight, options["eps"])
        else:
            y = F.layer_norm(wide, weight.shape, weight, norm_bias, options["eps"])
        return z, y.to(z.dtype)

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
        if not options.gated:
            return F.linear(activated(f, options.activation), outward.weight), x
        passed, multiplied = f.chunk(2, -1)
        return F.linear(activated(passed, options.activation) * multiplied, outward.weight), x
