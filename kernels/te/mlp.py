"""`te.LayerNormMLP`."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..fp8.linear import Fp8State
from ..fp8.project import project_mlp, runs_fp8
from ..ops.choices import Activation as FusedActivation
from ..ops.mlp.activation import activated
from ..ops.mlp.mlp import mlp
from ..ops.parallel_linear import ParallelMode
from .module import DEFAULT_INIT, Initializer, Shard, SharedOptions, cast_like, check_dtype, check_positive
from .normalization import Normalization, NormalizedModule

# Activations of kernels/ops/mlp, and whether they are gates: those pass the first half of the columns and multiply the rest.
_FUSED: dict[str, tuple[FusedActivation, bool]] = {
    "gelu": ("gelu_tanh", False),
    "gelu_erf": ("gelu", False),
    "silu": ("silu", False),
    "srelu": ("relu2", False),
    "geglu": ("gelu_tanh", True),
    "sreglu": ("relu2", True),
    "swiglu": ("silu", True),
}


def _qgelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_OTHERS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "qgelu": (_qgelu, False),
    "relu": (F.relu, False),
    "glu": (torch.sigmoid, True),
    "qgeglu": (_qgelu, True),
    "reglu": (F.relu, True),
}


class LayerNormMLP(NormalizedModule):
    """y = f(LayerNorm(x) @ fc1_weight.T + fc1_bias) @ fc2_weight.T + fc2_bias.

    hidden_size: H. ffn_hidden_size: F. eps, normalization, zero_centered_gamma, return_layernorm_output: as in
        `LayerNormLinear`.
    bias: whether both projections have one. (In Transformer Engine's first versions False took it from the second alone.)
    activation: f; 'gelu' is the tanh approximation, as in Transformer Engine and GPT-2, 'gelu_erf' the exact one, as in BERT;
        also qgelu, relu, srelu, silu, and the gated glu, geglu, qgeglu, reglu, sreglu, swiglu, whose fc1 has 2F rows: first
        those that pass f, then those it multiplies.
    init_method, output_layer_init_method: draw fc1_weight and fc2_weight in place; None: normal, standard deviation 0.023.
    return_bias: forward does not add fc2_bias but returns it; None without a bias.
    set_parallel_mode: fc1 is column-parallel and fc2 row-parallel.
    sequence_parallel, tp_group, tp_size, get_rng_state_tracker, fuse_wgrad_accumulation, params_dtype, device: see
        `SharedOptions`.
    seq_length, micro_batch_size: for Transformer Engine's JIT warm-up; nothing here needs one, so they change nothing.

    State dict: layer_norm_weight, layer_norm_bias (H,); fc1_weight (F, H), fc1_bias (F,); fc2_weight (H, F), fc2_bias (H,).
    """

    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None

    def __init__(  # noqa: PLR0913 - Transformer Engine's parameters
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        eps: float = 1e-5,
        bias: bool = True,
        *,
        normalization: Normalization = "LayerNorm",
        zero_centered_gamma: bool = False,
        activation: str = "gelu",
        init_method: Initializer | None = None,
        output_layer_init_method: Initializer | None = None,
        return_layernorm_output: bool = False,
        return_bias: bool = False,
        set_parallel_mode: bool = False,
        seq_length: int | None = None,
        micro_batch_size: int | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(SharedOptions(**shared))
        check_positive(hidden_size=hidden_size, ffn_hidden_size=ffn_hidden_size)
        activations = _FUSED | _OTHERS
        if activation not in activations:
            raise ValueError(f"activation={activation!r} is unknown; use one of {', '.join(activations)}")
        self.hidden_size, self.ffn_hidden_size = hidden_size, ffn_hidden_size
        self.activation, self.use_bias, self.return_bias = activation, bias, return_bias
        self.return_layernorm_output = return_layernorm_output
        self.set_parallel_mode = set_parallel_mode
        self._check_parallelism(set_parallel_mode, "set_parallel_mode=True")
        self.fc1_fp8, self.fc2_fp8 = Fp8State(), Fp8State()
        width = self.options.part("ffn_hidden_size", ffn_hidden_size)
        parts = 2 if activations[activation][1] else 1
        columns, rows = (Shard(0, parts), Shard(1)) if set_parallel_mode else (None, None)
        self._allocate_norm(hidden_size, eps, normalization, zero_centered_gamma)
        self._allocate("fc1_weight", (parts * width, hidden_size), init_method or DEFAULT_INIT, shard=columns)
        self._allocate("fc1_bias", (parts * width,) if bias else None, shard=columns)
        self._allocate("fc2_weight", (hidden_size, width), output_layer_init_method or DEFAULT_INIT, shard=rows)
        self._allocate("fc2_bias", (hidden_size,) if bias else None)

    def forward(
        self,
        inp: Tensor,
        is_first_microbatch: bool | None = None,
        *,
        normalized: Tensor | None = None,
        amax: Tensor | None = None,
    ) -> Tensor | tuple[Tensor | None, ...]:
        """Return the output (..., H), or a tuple (output, fc2_bias if return_bias, LayerNorm(inp) as in `LayerNormLinear`).

        is_first_microbatch: see `Linear.forward`. normalized: LayerNorm(inp), where an op before has computed it already;
        amax: of normalized, if it is known. Raises ValueError for a wrong last dim or dtype.
        """
        inp = self._enter(inp, self.hidden_size, "hidden_size")
        if normalized is None:
            normalized, amax = self._normalize(inp, self.fc1_fp8)
        out = self._transform(normalized, amax, is_first_microbatch)
        bias = self._replicated(self.fc2_bias)
        if bias is not None and not self.return_bias:
            out = out + cast_like(out, bias)
        results: tuple[Tensor | None, ...] = (out, self._handed_out(bias)) if self.return_bias else (out,)
        results += (normalized,) if self.return_layernorm_output else ()
        return results if len(results) > 1 else out

    def _transform(self, x: Tensor, amax: Tensor | None, is_first_microbatch: bool | None) -> Tensor:
        """Return the result of both products and what is between them, without the second bias. amax: of x."""
        if self.activation in _FUSED:
            if runs_fp8(self.fc1_fp8, x.device):
                return self._in_fp8(x, amax, is_first_microbatch)
            if self.options.ranks == 1:
                w1, w2 = (self._trained(weight, is_first_microbatch) for weight in (self.fc1_weight, self.fc2_weight))
                w1, w2 = cast_like(x, w1), cast_like(x, w2)
                b1 = None if self.fc1_bias is None else cast_like(x, self.fc1_bias)
                activation, gated = _FUSED[self.activation]
                return mlp(x, w1, b1, w2, activation, gated=gated, gelu_checkpoint=False)
        modes: tuple[ParallelMode | None, ...] = ("column", "row") if self.set_parallel_mode else (None, None)
        hidden = self._project(x, self.fc1_weight, self.fc1_bias, self.fc1_fp8, modes[0], is_first_microbatch, amax)
        return self._project(self._activate(hidden), self.fc2_weight, None, self.fc2_fp8, modes[1], is_first_microbatch)

    def _activate(self, hidden: Tensor) -> Tensor:
        if self.activation in _FUSED:
            activation, gated = _FUSED[self.activation]
            return activated(hidden, activation, gated=gated)
        function, gated = _OTHERS[self.activation]
        if not gated:
            return function(hidden)
        gate, value = hidden.chunk(2, -1)
        return function(gate) * value

    def _in_fp8(self, x: Tensor, amax: Tensor | None, is_first_microbatch: bool | None) -> Tensor:
        w1, w2 = self.fc1_weight, self.fc2_weight
        activation, gated = _FUSED[self.activation]
        for weight in (w1, w2):
            check_dtype(x, weight)
        return project_mlp(
            x,
            w1,
            self.fc1_bias,
            w2,
            activation,
            (self.fc1_fp8, self.fc2_fp8),
            self._shared_by(self.set_parallel_mode),
            gated=gated,
            is_first_microbatch=is_first_microbatch,
            main_grads=(self._main_grad(w1), self._main_grad(w2)),
            amax=amax,
        )

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, {self.ffn_hidden_size}, activation={self.activation}, bias={self.use_bias}"
