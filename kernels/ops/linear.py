"""The linear layer and its three matrix products, on the fastest library of the machine.

Forward y = x @ weight.T + bias; backward dx = dy @ weight, dweight = dy.T @ x, dbias = sum_T dy.

Which library computes a product:
  fp32 on a CPU     what `using_cpu_libraries` says, as a training run does, which has measured them; without it oneDNN on an
                    AMD CPU with AVX-512, where MKL may keep to AVX2, and torch's choice on others
  everything else   torch's choice: cuBLAS on CUDA, oneDNN for bf16 on a CPU
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..parallel.collectives import (
    Group,
    Pending,
    group_size,
    start_all_gather,
    start_all_reduce_,
    start_reduce_scatter,
)
from .operator import operator, reshaped

ONEDNN = "oneDNN"


class CpuLibraries(NamedTuple):
    """The names of the libraries that compute fp32 products on a CPU: those of values and input gradients, and of dweight."""

    product: str
    weight_gradient: str


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ weight.T + bias, (..., N) in the dtype of x; x: (..., K), weight: (N, K), bias: (N,) or None, one float dtype.

    Kept for backward, besides the weight: x. Raises ValueError if the last dim of x is not K.
    """
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has last dim {x.shape[-1]}, weight is {tuple(weight.shape)}; the last dims must be equal")
    if not (_takes_onednn(x, weight) or _gradient_takes_onednn(x, weight)):
        return F.linear(x, weight, bias)
    return Linear.apply(x, weight, bias, None, False)  # type: ignore[no-any-return, no-untyped-call]


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return a @ b.T + bias, (M, N), without autograd; a: (M, K), b: (N, K), either may be a transposed view; bias: (N,)."""
    if _takes_onednn(a, b) and a.numel() > 0:
        return _onednn_product(a, b, bias)
    return _own_product(a, b, bias)


def _own_product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return a.mm(b.t()) if bias is None else torch.addmm(bias, a, b.t())


# An operator of ours around torch's, because inductor would lower that one for constant weights, which these are not.
@operator(
    "onednn_product(Tensor a, Tensor b, Tensor? bias) -> Tensor",
    lambda a, b, bias: a.new_empty(a.shape[0], b.shape[0]),
)
def _onednn_product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return result


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """Return dy.T @ x, (N, K), without autograd; dy: (T, N), x: (T, K)."""
    if not (_gradient_takes_onednn(x, dy) and x.numel() and dy.numel()):
        return _own_product(dy.t(), x.t())
    if dy.numel() > x.numel() + dy.shape[1] * x.shape[1]:
        # oneDNN copies its first operand if that is transposed; here it is cheaper to copy x and to transpose the result
        return _onednn_product(x.t(), dy.t(), None).t().contiguous()
    return _onednn_product(dy.t(), x.t(), None)


def start_input_gradient(
    dy: Tensor, weight: Tensor, group: Group, sequence_parallel: bool, around: Tensor | None
) -> Callable[[], Tensor]:
    """Start dx = dy @ weight, (T, K), summed over the group, plus `around`; return what waits for it. Without autograd.

    around: (T, K), the gradient of the residual stream that goes around the product, or None. On a GPU a product of one process
    adds it for nothing, in its memory; elsewhere it is added behind, which gives the bits of autograd's own addition.
    """
    if around is not None and group_size(group) == 1 and _adds_inside(around):
        dx = around.addmm_(dy, weight)
        return lambda: dx
    summing = (start_reduce_scatter if sequence_parallel else start_all_reduce_)(product(dy, weight.t()), group)
    return lambda: summing.wait() if around is None else summing.wait().add_(around)


def _adds_inside(around: Tensor) -> bool:
    return around.is_cuda


def available_cpu_libraries() -> tuple[str, ...]:
    """Return the names of the libraries that can compute fp32 products on this machine's CPU, torch's own choice first."""
    own = "MKL" if torch.backends.mkl.is_available() else "torch's BLAS"
    return (own, ONEDNN) if torch.backends.mkldnn.is_available() else (own,)


def cpu_libraries() -> CpuLibraries:
    """Return the libraries that compute fp32 products on this machine's CPU now."""
    names = available_cpu_libraries()
    return CpuLibraries(names[-1 if _ONEDNN_PRODUCTS else 0], names[-1 if _ONEDNN_GRADIENTS else 0])


@contextmanager
def using_cpu_libraries(libraries: CpuLibraries) -> Iterator[None]:
    """Let these libraries, of `available_cpu_libraries`, compute fp32 products in all threads while inside."""
    global _ONEDNN_PRODUCTS, _ONEDNN_GRADIENTS
    before = _ONEDNN_PRODUCTS, _ONEDNN_GRADIENTS
    _ONEDNN_PRODUCTS, _ONEDNN_GRADIENTS = (name == ONEDNN for name in libraries)
    try:
        yield
    finally:
        _ONEDNN_PRODUCTS, _ONEDNN_GRADIENTS = before


def _takes_onednn(a: Tensor, b: Tensor) -> bool:
    return _ONEDNN_PRODUCTS and _is_cpu_fp32(a, b)


def _gradient_takes_onednn(a: Tensor, b: Tensor) -> bool:
    return _ONEDNN_GRADIENTS and _is_cpu_fp32(a, b)


def _is_cpu_fp32(a: Tensor, b: Tensor) -> bool:
    return a.is_cpu and b.is_cpu and a.dtype == torch.float32 and not torch.compiler.is_exporting()


def _is_amd_with_avx512() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not cpuinfo.exists():
        return False
    with cpuinfo.open(encoding="utf-8") as lines:
        return any("AuthenticAMD" in line for line in itertools.islice(lines, 8))  # the vendor of the first core


# Flags of the module, which a trace of torch.compile takes for constants.
_ONEDNN_PRODUCTS = _ONEDNN_GRADIENTS = torch.backends.mkldnn.is_available() and _is_amd_with_avx512()


class Linear(torch.autograd.Function):
    """`linear`, or with a group `column_parallel_linear`; with_input: `linear_and_input`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        group: Group,
        sequence_parallel: bool,
        with_input: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        rows, shape = x.reshape(-1, x.shape[-1]), [*x.shape[:-1], weight.shape[0]]
        ctx.save_for_backward(rows, weight)
        ctx.shape, ctx.group, ctx.sequence_parallel = x.shape, group, sequence_parallel
        if sequence_parallel:
            rows = start_all_gather(rows, group).wait()
            shape[0] *= group_size(group)
        ctx.set_materialize_grads(not with_input)
        y = reshaped(product(rows, weight, bias), *shape)
        return (y, x.view_as(x)) if with_input else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dinput: Tensor | None = None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return dinput, None, None, None, None, None
        rows, weight = ctx.saved_tensors
        needs_dx, needs_dweight, needs_dbias = ctx.needs_input_grad[:3]
        dy_rows = dy.reshape(-1, dy.shape[-1])
        gathering = start_all_gather(rows, ctx.group) if ctx.sequence_parallel and needs_dweight else Pending(rows)
        dx = dweight = None
        if needs_dx:
            around = None if dinput is None else dinput.reshape(-1, dinput.shape[-1])
            finish_dx = start_input_gradient(dy_rows, weight, ctx.group, ctx.sequence_parallel, around)
        if needs_dweight:
            dweight = weight_gradient(dy_rows, gathering.wait())
        dbias = dy_rows.sum(0) if needs_dbias else None
        if needs_dx:
            dx = finish_dx().view(ctx.shape)
        return dx, dweight, dbias, None, None, None
