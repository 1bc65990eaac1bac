"""LayerNorm and RMSNorm, as modules of their own and as the first step of the modules that begin with one."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..fp8.linear import Fp8State
from ..fp8.norm import norm_before
from ..ops.choices import Norm
from .module import Initializer, ProjectionModule, autocast, check_dtype, check_positive, with_memory

Normalization = Literal["LayerNorm", "RMSNorm"]


def check_normalization(normalization: str) -> None:
    """Raise ValueError for an unknown name."""
    if normalization not in get_args(Normalization):
        raise ValueError(f"normalization={normalization!r} is unknown; use 'LayerNorm' or 'RMSNorm'")


def kind_of(bias: Tensor | None) -> Norm:
    """Return the norm of these modules that has this bias: a LayerNorm always has one, an RMSNorm never."""
    return "rms_norm" if bias is None else "layer_norm"


def normalize(inp: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Return LayerNorm(inp), or RMSNorm(inp) where there is no bias, in the dtype of inp, computed in fp32 or wider.

    inp: (..., H); weight, bias: (H,), as `effective_weight` gives it.
    LayerNorm: (inp - mean) / sqrt(var + eps) * weight + bias; RMSNorm: inp / sqrt(mean(inp^2) + eps) * weight.
    """
    return normalize_before(None, inp, weight, bias, eps)[0]


def normalize_before(
    fp8: Fp8State | None, inp: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """Return what `normalize` gives, and its amax where the next product, that of fp8, makes use of it."""
    return norm_before(fp8, None, None, inp, weight, bias, eps=eps, kind=kind_of(bias))[1:]


def effective_weight(weight: Tensor, zero_centered_gamma: bool) -> Tensor:
    """Return the factor of a norm: its parameter, or 1 + it, in fp32 or wider so that a small deviation from 1 is not lost."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32)) + 1 if zero_centered_gamma else weight


class LayerNorm(nn.Module):
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the last dim.

    hidden_size: H. eps: added to the variance.
    sequence_parallel: marks weight and bias with the attribute `sequence_parallel=True` and communicates nothing. It tells a
        trainer that their gradients are sums over this rank's part of the sequence, which it has to add up over the ranks.
    params_dtype, device: of the parameters. zero_centered_gamma: the factor is 1 + weight, and weight starts at 0.

    State dict: weight, bias (H,); layer_norm_weight and layer_norm_bias, Transformer Engine's first names, are loaded too.
    """

    _names: tuple[str, ...] = ("weight", "bias")

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        sequence_parallel: bool = False,
        params_dtype: torch.dtype = torch.float32,
        zero_centered_gamma: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_positive(hidden_size=hidden_size)
        self.eps = eps
        self.zero_centered_gamma = zero_centered_gamma
        self.weight: Tensor
        self.bias: Tensor | None = None
        for name in self._names:
            values = torch.full((hidden_size,), self._start_of(name), dtype=params_dtype, device=device)
            parameter = nn.Parameter(values)
            parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
            setattr(self, name, parameter)

    def reset_parameters(self) -> None:
        """Start with the identity after the normalization; parameters on `meta` move to torch's default device."""
        for name in self._names:
            setattr(self, name, with_memory(getattr(self, name)))
            nn.init.constant_(getattr(self, name), self._start_of(name))

    def _start_of(self, name: str) -> float:
        return 1.0 if name == "weight" and not self.zero_centered_gamma else 0.0

    def forward(self, inp: Tensor) -> Tensor:
        """Return the normalized input, (..., H) in its dtype, or in that of torch.autocast.

        Raises ValueError where the last dim of inp is not hidden_size, or its dtype not that of the parameters.
        """
        if inp.shape[-1:] != self.weight.shape:
            raise ValueError(
                f"the input is {tuple(inp.shape)}; its last dim must be hidden_size={self.weight.shape[0]}"
            )
        inp = autocast(inp)
        check_dtype(inp, self.weight)
        return normalize(inp, effective_weight(self.weight, self.zero_centered_gamma), self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}_extra_state", None)  # see ProjectionModule
        for name in self._names:
            if f"{prefix}layer_norm_{name}" in state_dict:
                state_dict[prefix + name] = state_dict.pop(f"{prefix}layer_norm_{name}")
        super()._load_from_state_dict(state_dict, prefix, *args)


class RMSNorm(LayerNorm):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dim; parameters as in `LayerNorm`, without a bias."""

    _names = ("weight",)


class NormalizedModule(ProjectionModule):
    """A module that begins with a norm, whose parameters are layer_norm_weight and, for LayerNorm, layer_norm_bias."""

    layer_norm_weight: Tensor
    layer_norm_bias: Tensor | None

    def _allocate_norm(self, size: int, eps: float, normalization: Normalization, zero_centered_gamma: bool) -> None:
        check_normalization(normalization)
        self.eps = eps
        self.normalization = normalization
        self.zero_centered_gamma = zero_centered_gamma
        start: Initializer = nn.init.zeros_ if zero_centered_gamma else nn.init.ones_
        self._allocate("layer_norm_weight", (size,), start)
        self._allocate("layer_norm_bias", (size,) if normalization == "LayerNorm" else None)

    def norm_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of the norm as `normalize` takes them."""
        weight = self._replicated(self.layer_norm_weight)
        assert weight is not None, "a norm has a weight"
        return effective_weight(weight, self.zero_centered_gamma), self._replicated(self.layer_norm_bias)

    def _normalize(self, inp: Tensor, fp8: Fp8State) -> tuple[Tensor, Tensor | None]:
        """Compute what `normalize_before` does; fp8: of the module's first product."""
        check_dtype(inp, self.layer_norm_weight)
        return normalize_before(fp8, inp, *self.norm_parameters(), self.eps)
