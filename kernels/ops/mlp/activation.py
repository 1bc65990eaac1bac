"""What stands between the two products of a feed-forward half: an activation, or one that is a gate, as one pass each way.

Forward a = act(f), or gated, with the halves g and u of a row of f, a = act(g) * u.
Backward df = da * act'(f), or gated the halves da * u * act'(g) and da * act(g);  db = sum_T df, of the bias that is in f.
Sources: GELU, arXiv 1606.08415; SiLU, arXiv 1702.03118; relu(x)**2, arXiv 2109.08668; gates, arXiv 2002.05202.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..choices import Activation, Kernels, uses_triton
from ..operator import operator, reshaped

_TANH_LINEAR = 2 * math.sqrt(2 / math.pi)
_TANH_CUBIC = 0.044715 * _TANH_LINEAR
_PART = 1 << 17  # elements; with fewer the calls take longer than they save
_FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu2": lambda x: F.relu(x).square(),
}


def activated(f: Tensor, activation: Activation, *, gated: bool = False, kernels: Kernels = "auto") -> Tensor:
    """Return act(f), (..., F), or gated act(f[..., :F]) * f[..., F:] of f (..., 2F), in the dtype of f.

    Kept for backward: f. Raises ValueError for a gate over an odd number of columns.
    """
    if not gated and activation != "relu2":  # torch has these as one pass each way
        return _FUNCTIONS[activation](f)
    if gated and f.shape[-1] % 2:
        raise ValueError(f"f has last dim {f.shape[-1]}; a gate and what it multiplies are equally wide")
    return _Activated.apply(f, activation, gated, kernels)  # type: ignore[no-any-return, no-untyped-call]


def activation_gradient(
    da: Tensor, f: Tensor, activation: Activation, gated: bool, recompute: bool, with_bias: bool, kernels: Kernels
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return df in the shape of f, db as wide or None without a bias, and a if recompute; without autograd.

    da: (T, F), contiguous; f: (T, F), or gated (T, 2F). df takes the place of da, or if gated and recompute a does.
    """
    run = _gate_backward_ if gated else _activation_backward_
    other, db = run(da, f, activation, recompute, with_bias, kernels)
    df, a = (other, da) if gated else (da, other)
    return df, db if with_bias else None, a if recompute else None


def activation_forward_reference(f: Tensor, activation: Activation, gated: bool) -> Tensor:
    """Return a, (T, F)."""
    if not gated:
        return _values(f, activation)
    g, u = f.chunk(2, 1)
    if torch.compiler.is_exporting():
        return _values(g, activation) * u
    a = f.new_empty(g.shape)
    for g_part, u_part, a_part in _parts(g, u, a):
        torch.mul(_values(g_part, activation), u_part, out=a_part)
    return a


def activation_backward_reference(
    da: Tensor, f: Tensor, activation: Activation, recompute: bool, with_bias: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return df (T, F) in the place of da, db (F,) with_bias, and a if recompute; da, f: (T, F), contiguous."""
    df, a = _gradient_(da, f, activation, recompute)
    return df, df.sum(0) if with_bias else None, a


def gate_backward_reference(
    da: Tensor, f: Tensor, activation: Activation, recompute: bool, with_bias: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Return df (T, 2F) and db (2F,) with_bias; da (T, F) becomes a if recompute; da, f (T, 2F): contiguous."""
    df = torch.empty_like(f)
    for g, u, dg, du, d in _parts(*f.chunk(2, 1), *df.chunk(2, 1), da):
        _, values = _gradient_(torch.mul(d, u, out=dg), g, activation, True)
        assert values is not None, "they were asked for"
        torch.mul(d, values, out=du)
        if recompute:
            torch.mul(values, u, out=d)
    return df, df.sum(0) if with_bias else None


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the tensors (T, F), on a CPU some rows of them at a time, so that what is made of those stays in its cache."""
    first = tensors[0]
    rows = max(1, _PART // first.shape[1]) if first.device.type == "cpu" else len(first)
    yield from zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def _values(x: Tensor, activation: Activation) -> Tensor:
    """Return act(x)."""
    if activation == "gelu_tanh" and x.device.type == "cpu" and not torch.compiler.is_exporting():
        return _tanh_gate(x).mul_(x).to(x.dtype)
    return _FUNCTIONS[activation](x)


def _gradient_(da: Tensor, x: Tensor, activation: Activation, with_values: bool) -> tuple[Tensor, Tensor | None]:
    """Return da * act'(x) in the place of da, and act(x) if asked for."""
    if activation == "gelu_tanh" and x.device.type == "cpu":
        gate = _tanh_gate(x)
        inner = x.to(gate.dtype).square().mul_(3 * _TANH_CUBIC).add_(_TANH_LINEAR).mul_(x)
        slope = inner.mul_(1 - gate).add_(1).mul_(gate)  # gate + x gate' = gate (1 + (1 - gate) x (2 u)')
        return da.copy_(slope.mul_(da)), gate.mul_(x).to(x.dtype) if with_values else None
    if activation == "silu":
        torch.ops.aten.silu_backward.grad_input(da, x, grad_input=da)
    elif activation == "relu2":
        da.mul_(F.relu(x).mul_(2))
    else:
        approximation = "tanh" if activation == "gelu_tanh" else "none"
        torch.ops.aten.gelu_backward.grad_input(da, x, approximate=approximation, grad_input=da)
    return da, _values(x, activation) if with_values else None


def _tanh_gate(x: Tensor) -> Tensor:
    """Return sigmoid(2 u) = (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x**3), fp32 or wider.

    On a CPU torch's own tanh GELU takes three times as long as this.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * wide).mul_(_TANH_CUBIC).add_(_TANH_LINEAR).mul_(wide).sigmoid_()


@operator(
    "activation_forward(Tensor f, str activation, bool gated, str kernels) -> Tensor",
    lambda f, activation, gated, kernels: f.new_empty(f.shape[0], f.shape[1] // (2 if gated else 1)),
)
def activation_forward(f: Tensor, activation: Activation, gated: bool, kernels: Kernels) -> Tensor:
    """Return a (T, F) of f (T, F), or gated (T, 2F); without autograd."""
    if uses_triton(f, kernels):
        from .activation_triton import activation_forward as forward
    else:
        forward = activation_forward_reference
    return forward(f, activation, gated)


@operator(
    "activation_backward_(Tensor(a!) da, Tensor f, str activation, bool recompute, bool with_bias, str kernels) "
    "-> (Tensor, Tensor)",
    lambda da, f, activation, recompute, with_bias, kernels: (
        f.new_empty(f.shape if recompute else 0),
        f.new_empty(f.shape[1] if with_bias else 0),
    ),
)
def _activation_backward_(
    da: Tensor, f: Tensor, activation: Activation, recompute: bool, with_bias: bool, kernels: Kernels
) -> tuple[Tensor, Tensor]:
    """Return a (T, F) and db (F,), empty unless asked for; da (T, F) becomes df."""
    if uses_triton(f, kernels):
        from .activation_triton import activation_backward as backward
    else:
        backward = activation_backward_reference
    _, db, a = backward(da, f, activation, recompute, with_bias)
    return f.new_empty(0) if a is None else a, f.new_empty(0) if db is None else db


@operator(
    "gate_backward_(Tensor(a!) da, Tensor f, str activation, bool recompute, bool with_bias, str kernels) "
    "-> (Tensor, Tensor)",
    lambda da, f, activation, recompute, with_bias, kernels: (
        f.new_empty(f.shape),
        f.new_empty(f.shape[1] if with_bias else 0),
    ),
)
def _gate_backward_(
    da: Tensor, f: Tensor, activation: Activation, recompute: bool, with_bias: bool, kernels: Kernels
) -> tuple[Tensor, Tensor]:
    """Return df (T, 2F), and db (2F,), empty without a bias; with recompute da (T, F) becomes a."""
    if uses_triton(f, kernels):
        from .activation_triton import gate_backward as backward
    else:
        backward = gate_backward_reference
    df, db = backward(da, f, activation, recompute, with_bias)
    return df, f.new_empty(0) if db is None else db


class _Activated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, f: Tensor, activation: Activation, gated: bool, kernels: Kernels) -> Tensor:
        rows = f.reshape(-1, f.shape[-1])
        ctx.save_for_backward(rows)
        ctx.activation, ctx.gated, ctx.kernels = activation, gated, kernels
        a = activation_forward(rows, activation, gated, kernels)
        return reshaped(a, *f.shape[:-1], a.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, da: Tensor) -> tuple[Tensor | None, ...]:
        (f,) = ctx.saved_tensors
        rows = da.reshape(-1, da.shape[-1]).contiguous()
        if not ctx.gated:  # df takes the place of da, which may be somebody else's
            rows = rows.clone()
        df, *_ = activation_gradient(rows, f.contiguous(), ctx.activation, ctx.gated, False, False, ctx.kernels)
        return df.view(*da.shape[:-1], f.shape[1]), None, None, None
