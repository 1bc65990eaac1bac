"""`te.Linear` and `te.LayerNormLinear`."""

from typing import Any

from torch import Tensor

from ..fp8.linear import Fp8State
from .module import DEFAULT_INIT, Initializer, ProjectionModule, Shard, SharedOptions, check_positive, parallel_mode_of
from .normalization import Normalization, NormalizedModule


class Linear(ProjectionModule):
    """y = x @ weight.T + bias.

    in_features, out_features: K and N, of the whole layer over all ranks. bias: whether there is one.
    sequence_parallel, tp_group, tp_size, parallel_mode: see `SharedOptions`; parallel_mode is 'column' (this rank has a part
        of the output), 'row' (a part of the input) or None, as 'Column' and 'Row' too.
    get_rng_state_tracker, fuse_wgrad_accumulation, params_dtype, device: see `SharedOptions`.
    init_method: draws the weight in place; None: normal of mean 0 and standard deviation 0.023.
    skip_weight_param_allocation: no parameters; each forward is given `weight`, and `bias` if bias is True.
    return_bias: forward does not add the bias but returns it, for an op behind it that adds it for free. (Transformer Engine
        before 2023 did both.) Without a bias it returns None in its place.

    State dict: weight (N, K), bias (N,) if there is one; divided by tp_size, N for 'column' and K for 'row'.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        init_method: Initializer | None = None,
        parallel_mode: str | None = None,
        skip_weight_param_allocation: bool = False,
        return_bias: bool = False,
        **shared: Any,
    ) -> None:
        super().__init__(SharedOptions(**shared))
        check_positive(in_features=in_features, out_features=out_features)
        self.in_features, self.out_features = in_features, out_features
        self.use_bias, self.return_bias = bias, return_bias
        self.skip_weight_param_allocation = skip_weight_param_allocation
        self.parallel_mode = parallel_mode_of(parallel_mode)
        self.fp8 = Fp8State()
        self._check_parallelism(self.parallel_mode is not None, "parallel_mode='column' or 'row'")
        columns = in_features if self.parallel_mode != "row" else self.options.part("in_features", in_features)
        rows = out_features if self.parallel_mode != "column" else self.options.part("out_features", out_features)
        self.local_shape = (rows, columns)
        allocated = not skip_weight_param_allocation
        shard = None if self.parallel_mode is None else Shard(0 if self.parallel_mode == "column" else 1)
        self._allocate("weight", self.local_shape if allocated else None, init_method or DEFAULT_INIT, shard=shard)
        self._allocate(
            "bias", (rows,) if allocated and bias else None, shard=shard if self.parallel_mode == "column" else None
        )

    def forward(
        self,
        inp: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        is_first_microbatch: bool | None = None,
    ) -> Tensor | tuple[Tensor | None, ...]:
        """Return the output (..., N) of an input (..., K), with return_bias (output, bias).

        weight, bias: for skip_weight_param_allocation, and for nothing else.
        is_first_microbatch: whether this is the first of the micro-batches between two updates of the weights; with
            fuse_wgrad_accumulation True overwrites `weight.main_grad`, None and False add to it.
        Raises ValueError for a wrong last dim or dtype, and for a weight or bias that is missing or not asked for.
        """
        out, returned = self._apply_projection(
            self._enter(inp, self.local_shape[1], "in_features"), weight, bias, is_first_microbatch
        )
        return (out, returned) if self.return_bias else out

    def _apply_projection(
        self,
        inp: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        is_first_microbatch: bool | None,
        amax: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the product with the bias added or, for return_bias, beside it. amax: of inp."""
        weight, bias = self._choose(weight, bias)
        added, returned = (None, self._returned(bias)) if self.return_bias else (bias, None)
        return self._project(inp, weight, added, self.fp8, self.parallel_mode, is_first_microbatch, amax), returned

    def _returned(self, bias: Tensor | None) -> Tensor | None:
        """Return the bias for the caller, who adds it to this rank's output."""
        return self._handed_out(self._replicated(bias) if self.parallel_mode == "row" else bias)

    def _choose(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not self.skip_weight_param_allocation:
            if weight is not None or bias is not None:
                raise ValueError(
                    "forward was given a weight or bias but the module has its own; build it with "
                    "skip_weight_param_allocation=True to pass them"
                )
            assert self.weight is not None, "allocated with the module"
            return self.weight, self.bias
        if self.weight is not None or self.bias is not None:
            raise ValueError(
                "skip_weight_param_allocation=True takes weight and bias from forward, but the module was given one as an "
                "attribute, which would not be used; remove it"
            )
        if weight is None or weight.shape != self.local_shape:
            found = "none" if weight is None else str(tuple(weight.shape))
            raise ValueError(
                f"weight is {found}; skip_weight_param_allocation=True needs weight={self.local_shape} at each forward"
            )
        if (bias is not None) != self.use_bias:
            raise ValueError(
                f"bias is {'given' if bias is not None else 'missing'} in forward; the module has bias={self.use_bias}"
            )
        return weight, bias

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.use_bias}, parallel_mode={self.parallel_mode}"


class LayerNormLinear(NormalizedModule, Linear):
    """y = LayerNorm(x) @ weight.T + bias.

    in_features, out_features, bias and what is not named here: as in `Linear`.
    eps, normalization, zero_centered_gamma: see `LayerNorm`; normalization is 'LayerNorm' or 'RMSNorm'.
    return_layernorm_output: forward returns LayerNorm(x) as well, of x's shape and dtype.

    State dict: layer_norm_weight, layer_norm_bias (K,), the latter for LayerNorm alone; weight and bias as in `Linear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        bias: bool = True,
        *,
        normalization: Normalization = "LayerNorm",
        zero_centered_gamma: bool = False,
        return_layernorm_output: bool = False,
        **linear_options: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, **linear_options)
        self.return_layernorm_output = return_layernorm_output
        self._allocate_norm(in_features, eps, normalization, zero_centered_gamma)
        for name in ("weight", "bias"):  # behind the norm's, as there: optimizers keep their state by position
            self._parameters[name] = self._parameters.pop(name)

    def forward(
        self,
        inp: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        is_first_microbatch: bool | None = None,
    ) -> Tensor | tuple[Tensor | None, ...]:
        """Return the output (..., N), or a tuple (output, bias if return_bias, LayerNorm(inp) if return_layernorm_output).

        Arguments and errors as in `Linear.forward`.
        """
        normalized, amax = self._normalize(self._enter(inp, self.in_features, "in_features"), self.fp8)
        out, returned = self._apply_projection(normalized, weight, bias, is_first_microbatch, amax)
        extra = ((returned,) if self.return_bias else ()) + ((normalized,) if self.return_layernorm_output else ())
        return (out, *extra) if extra else out
