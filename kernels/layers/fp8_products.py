"""The matrix products of a layer in FP8. A layer imports this file in its first pass inside fp8_autocast, and not before."""

from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..fp8.linear import Fp8State, breaks_graph, check_fp8_features
from ..fp8.norm import norm_before
from ..fp8.project import project, project_mlp, runs_fp8
from ..ops.mlp.mlp import MlpOptions
from ..ops.parallel_linear import ParallelMode
from ..parallel.collectives import TensorParallel
from .config import LayerConfig
from .parts import compose
from .products import Products

_OF_TRACES = Fp8State()  # stays empty: a trace has current scaling, which keeps nothing


def state_of(projection: Any) -> Fp8State:
    """Return the FP8 state of a projection, which owns it from now on."""
    if (
        getattr(projection, "fp8", None) is None
    ):  # an nn.Linear that was put in a projection's place has no such place yet
        if torch.compiler.is_compiling() and not breaks_graph():
            return _OF_TRACES
        projection.fp8 = Fp8State()
    state: Fp8State = projection.fp8
    return state


class Fp8Products(Products):
    """Compute the products of one pass with FP8 operands where fp8_autocast says so, and did so before a recomputation.

    A norm gives the amax of its output where the cast of that output makes use of it; the next product takes it.
    qkv, intermediate: None where the layer calls that module, which takes no amax.
    """

    def __init__(self, qkv: Any, intermediate: Any) -> None:
        states = (None if projection is None else state_of(projection) for projection in (qkv, intermediate))
        self._before_attention, self._before_mlp = states
        self._amax: Tensor | None = None

    def norm(self, z: Tensor, weight: Tensor, norm_bias: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
        z, y, self._amax = norm_before(self._before_attention, None, None, z, weight, norm_bias, **options)
        return z, y

    def residual_norm(self, x: Tensor, *tensors: Any, **options: Any) -> tuple[Tensor, Tensor]:
        z, y, self._amax = norm_before(self._before_mlp, x, *tensors, **options)
        return z, y

    def project(self, x: Tensor, projection: Any, mode: ParallelMode, parallel: TensorParallel) -> Tensor:
        bias = projection.bias if mode == "column" else None
        state, amax = state_of(projection), self._take_amax()
        return project(x, projection.weight, bias, state, mode, parallel, amax=amax)

    def project_and_input(self, x: Tensor, projection: Any, parallel: TensorParallel) -> tuple[Tensor, Tensor]:
        return self.project(x, projection, "column", parallel), x

    def mlp(self, x: Tensor, inward: Any, outward: Any, options: MlpOptions) -> tuple[Tensor, Tensor]:
        states, amax = (state_of(inward), state_of(outward)), self._take_amax()
        if not runs_fp8(states[0], x.device):
            return super().mlp(x, inward, outward, options)
        parameters = inward.weight, inward.bias, outward.weight
        return project_mlp(
            x, *parameters, options.activation, states, options.parallel, gated=options.gated, amax=amax
        ), x

    def _take_amax(self) -> Tensor | None:
        amax, self._amax = self._amax, None
        return amax


def check_fp8(config: LayerConfig, parallel: TensorParallel) -> None:
    """Raise ValueError for a layer whose products take no FP8 operands, or whose flags would do nothing with them."""
    for flag in ("normalize_invertible", "gelu_checkpoint"):
        if getattr(config, flag):
            raise UserError(
                f"{flag}=True saves nothing with fp8=True, which keeps inputs of products in one byte a number; turn one off"
            )
    heads = compose(config, parallel).heads
    widths = heads.queries * heads.size, (heads.queries + 2 * heads.keys) * heads.size
    for width in (*widths, config.intermediate_size // parallel.size):
        check_fp8_features(config.hidden_size, width)
