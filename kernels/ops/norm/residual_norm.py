"""residual + dropout(x + bias) and the LayerNorm or RMSNorm that follows it, as one op; each part also on its own.

Forward, rows of T, sums over H: z = residual + keep * (x + bias) / (1 - p);  x_hat = (z - mean) * rstd;
y = x_hat * weight + norm_bias. Backward: w = dy * weight;
dresidual = dz + rstd * (w - mean(w) - x_hat * mean(w * x_hat));  dx = dresidual * keep / (1 - p);
dbias = sum_T dx;  dweight = sum_T dy * x_hat;  dnorm_bias = sum_T dy.
RMSNorm is the same with 0 in the place of mean and mean(w), and rstd = 1 / sqrt(mean(z**2) + eps).
Sources: Ba et al., Layer Normalization, arXiv 1607.06450; Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv
1910.07467.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..amax import largest_magnitude
from ..choices import Kernels, Norm, uses_triton
from ..dropout import keep_mask, keep_scale
from ..operator import operator, reshaped, reused
from .residual_norm_options import Gradients, Options, Saved, check_shapes, make_options
from .row_norms import layer_norm, norm_gradients, rms_norm

# Recovering x_hat = (y - bias) / weight multiplies the rounding error of y by about (|bias| + |weight|) / |weight|. Above
# these bounds the gradient of a column's weight is off by more than about a percent, so that column's call keeps the input.
_LARGEST_AMPLIFICATION = {torch.float64: 1e12, torch.float32: 1e4, torch.float16: 32.0, torch.bfloat16: 8.0}


def residual_norm(  # noqa: PLR0913 - the tensors of two ops
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor | None,
    *,
    eps: float,
    p: float,
    seed: Tensor | None,
    site: int,
    invertible: bool = False,
    kernels: Kernels = "auto",
    kind: Norm = "layer_norm",
) -> tuple[Tensor, Tensor]:
    """Return z = residual + dropout(x + bias) and y = LayerNorm(z) * weight + norm_bias, both with shape and dtype of residual.

    x, residual: (..., H), equal shapes and dtypes; bias, norm_bias: (H,) or None; weight: (H,).
    kind: `rms_norm` for RMSNorm(z) * weight, without a norm_bias.
    p, seed, site: dropout, see `kernels.dropout`; seed None means no dropout (evaluation).
    Kept for backward, besides parameters: z, and reciprocal deviation and, of LayerNorm, mean per row in fp32. No mask: it is
    drawn again.
    invertible: keep y instead of z and mean. y is the input of the next projection, which keeps it anyway, so z is then kept
    by nobody. Only for parameters that `are_invertible` allows; with others their gradients are wrong.
    Raises ValueError for shapes that do not fit, and on a GPU for float64 or H over 8192.
    """
    options = make_options(eps, p, seed, site, invertible, kernels, kind)
    return sum_norm_and_amax(x, bias, residual, weight, norm_bias, seed, options)[:2]


def norm(
    z: Tensor,
    weight: Tensor,
    norm_bias: Tensor | None,
    *,
    eps: float,
    invertible: bool = False,
    kernels: Kernels = "auto",
    kind: Norm = "layer_norm",
) -> Tensor:
    """Return LayerNorm(z) * weight + norm_bias, with the shape and dtype of z: `residual_norm` without anything to add."""
    return norm_and_input(z, weight, norm_bias, eps=eps, invertible=invertible, kernels=kernels, kind=kind)[1]


def norm_and_input(
    z: Tensor,
    weight: Tensor,
    norm_bias: Tensor | None,
    *,
    eps: float,
    invertible: bool,
    kernels: Kernels,
    kind: Norm = "layer_norm",
) -> tuple[Tensor, Tensor]:
    """Return z again for the residual stream, whose gradient backward adds to the norm's in one pass, and `norm`."""
    options = make_options(eps, 0.0, None, 0, invertible, kernels, kind)
    return sum_norm_and_amax(None, None, z, weight, norm_bias, None, options)[:2]


def sum_norm_and_amax(
    x: Tensor | None,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor | None,
    seed: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return z and y of `residual_norm`, or without x `norm_and_input`, and with options.amax max |y|, (), fp32."""
    check_shapes(x, bias, residual, weight, norm_bias)
    if norm_bias is not None and options.kind == "rms_norm":
        raise ValueError("norm_bias is given, and an RMSNorm has none; leave it out, or take kind='layer_norm'")
    drawn = seed if options.p > 0 else None
    z, y, amax = _ResidualNorm.apply(x, bias, residual, weight, norm_bias, drawn, options)  # type: ignore[no-untyped-call]
    return z, y, amax


def residual_add(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    *,
    p: float,
    seed: Tensor | None,
    site: int,
    kernels: Kernels = "auto",
) -> Tensor:
    """Return z = residual + dropout(x + bias), the end of a pre-LN layer; arguments as in `residual_norm`.

    Keeps no activation.
    """
    check_shapes(x, bias, residual, None, None)
    options = make_options(0.0, p, seed, site, False, kernels)
    return _ResidualAdd.apply(  # type: ignore[no-any-return, no-untyped-call]
        x, bias, residual, seed if options.p > 0 else None, options
    )


def dropout(x: Tensor, *, p: float, seed: Tensor | None, site: int, kernels: Kernels = "auto") -> Tensor:
    """Return dropout(x) of (..., H), its mask drawn from (seed, site); x itself if seed is None or p = 0. Keeps no mask."""
    options = make_options(0.0, p, seed, site, False, kernels)
    return x if options.p == 0 else _Dropout.apply(x, seed, options)  # type: ignore[no-any-return, no-untyped-call]


@torch.no_grad()
def are_invertible(weights: Sequence[Tensor], biases: Sequence[Tensor | None], dtype: torch.dtype) -> list[bool]:
    """Return for each norm whether its input can be recovered from an output of `dtype` to about one percent of the gradients.

    weights, biases: (H,) each, or None for a bias. All norms are looked up at once: the answer makes the host wait for a GPU.
    """
    magnitudes = torch.stack(list(weights)).abs().float()
    given = [torch.zeros_like(w) if b is None else b for w, b in zip(weights, biases, strict=True)]
    amplifications = (torch.stack(given).abs().float() + magnitudes) / magnitudes
    worst: list[float] = amplifications.amax(1).tolist()
    return [w <= _LARGEST_AMPLIFICATION[dtype] for w in worst]  # inf and nan (weight = 0) compare false


def residual_add_forward_reference(
    x: Tensor, bias: Tensor | None, residual: Tensor, seed: Tensor | None, options: Options
) -> Tensor:
    """Return z (T, H) from x and residual (T, H)."""
    if seed is None:
        return residual + x if bias is None else (x + bias).add_(residual)
    mask = keep_mask(x.shape, options.p, seed, options.site)
    kept = x * mask if bias is None else (x + bias).mul_(mask)
    return torch.add(residual, kept, alpha=keep_scale(options.p), out=reused(kept))


def residual_add_backward_reference(
    dz: Tensor, bias: Tensor | None, seed: Tensor | None, options: Options
) -> tuple[Tensor, Tensor | None]:
    """Return dx (T, H), which is dz itself without dropout, and dbias (H,), None if bias is None."""
    dx = dz
    if seed is not None:
        dx = (dz * keep_mask(dz.shape, options.p, seed, options.site)).mul_(keep_scale(options.p))
    return dx, None if bias is None else dx.sum(0).to(bias.dtype)


def residual_norm_forward_reference(
    x: Tensor | None,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor | None,
    seed: Tensor | None,
    options: Options,
    amax: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return z and y (T, H), mean and rstd (T,), from x and residual (T, H); without x, z is residual. RMSNorm: mean is None.

    amax: (), fp32, becomes max |y|.
    """
    z = residual if x is None else residual_add_forward_reference(x, bias, residual, seed, options)
    mean = None
    if options.kind == "rms_norm":
        y, rstd = rms_norm(z, weight, options.eps)
    else:
        y, mean, rstd = layer_norm(z, weight, norm_bias, options.eps)
    if amax is not None:
        amax.copy_(largest_magnitude(y))
    return z, y, mean, rstd


def residual_norm_backward_reference(dz: Tensor | None, dy: Tensor, saved: Saved, options: Options) -> Gradients:
    """Return dx (T, H), dbias (H,), dresidual (T, H), dweight (H,), dnorm_bias (H,); that of a missing bias is None.

    dz: (T, H) or None for zero; dy: (T, H). Without dropout dx is the same tensor as dresidual.
    """
    kept, weight, norm_bias = saved.kept, saved.weight, saved.norm_bias
    dresidual, dweight, dnorm_bias = norm_gradients(dy, saved, options.kind, options.inverted)
    if dz is not None:
        dresidual.add_(dz)
    dx, dbias = residual_add_backward_reference(dresidual, saved.bias, saved.seed, options)
    dresidual_out = dresidual.to(kept.dtype)
    dx_out = dresidual_out if dx is dresidual else dx.to(kept.dtype)
    dnorm_bias = None if norm_bias is None or dnorm_bias is None else dnorm_bias.to(norm_bias.dtype)
    return dx_out, dbias, dresidual_out, dweight.to(weight.dtype), dnorm_bias


_OPTIONS_SCHEMA = "float eps, float p, int site, bool inverted, str kernels, bool amax=False, str kind='layer_norm'"


def _fake_norm_forward(x: Tensor | None, _: Tensor | None, residual: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    wide, options = torch.promote_types(residual.dtype, torch.float32), Options(*rest[3:])
    z = residual.new_empty(0 if x is None else residual.shape)
    rstd = residual.new_empty(residual.shape[0], dtype=wide)
    mean = residual.new_empty(0) if options.kind == "rms_norm" else torch.empty_like(rstd)
    amax = residual.new_empty(() if options.amax else 0, dtype=torch.float32)
    return z, residual.new_empty(residual.shape), mean, rstd, amax


@operator(
    "residual_norm_forward(Tensor? x, Tensor? bias, Tensor residual, Tensor weight, Tensor? norm_bias, Tensor? seed, "
    f"{_OPTIONS_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_norm_forward,
)
def _norm_forward(x: Tensor | None, bias: Tensor | None, residual: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Return z, y (T, H), mean and rstd (T,) on the path that the options and the device choose, and amax.

    Without x z is empty, of RMSNorm mean is, and without options.amax amax is.
    """
    weight, norm_bias, seed, *values = rest
    options = Options(*values)
    forward = residual_norm_forward_reference
    if uses_triton(residual, options.kernels):
        from .residual_norm_triton import residual_norm_forward as forward
    amax = residual.new_zeros((), dtype=torch.float32) if options.amax else None
    z, y, mean, rstd = forward(x, bias, residual, weight, norm_bias, seed, options, amax)
    z = residual.new_empty(0) if x is None else z
    mean = residual.new_empty(0) if mean is None else mean
    return z, y, mean, rstd, residual.new_empty(0, dtype=torch.float32) if amax is None else amax


def _fake_norm_backward(dz: Tensor | None, dy: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    saved = Saved(*rest[: len(Saved._fields)])
    shape = saved.kept.shape
    dx = saved.kept.new_empty(0 if saved.seed is None else shape)
    dbias = torch.empty_like(saved.bias) if saved.bias is not None else dy.new_empty(0)
    dresidual = saved.kept.new_empty(shape)
    dnorm_bias = torch.empty_like(saved.norm_bias) if saved.norm_bias is not None else dy.new_empty(0)
    return dx, dbias, dresidual, torch.empty_like(saved.weight), dnorm_bias


@operator(
    "residual_norm_backward(Tensor? dz, Tensor dy, Tensor kept, Tensor? mean, Tensor rstd, Tensor weight, "
    f"Tensor? norm_bias, Tensor? bias, Tensor? seed, {_OPTIONS_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_norm_backward,
)
def _norm_backward(dz: Tensor | None, dy: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Return dx, dbias, dresidual, dweight, dnorm_bias; empty are dx where it equals dresidual, and those of missing biases."""
    saved, options = Saved(*rest[: len(Saved._fields)]), Options(*rest[len(Saved._fields) :])
    if uses_triton(saved.kept, options.kernels):
        from .residual_norm_triton import residual_norm_backward as backward
    else:
        backward = residual_norm_backward_reference
    dx, dbias, dresidual, dweight, dnorm_bias = backward(dz, dy, saved, options)
    dx = dy.new_empty(0) if dx is dresidual else dx
    dbias, dnorm_bias = (dy.new_empty(0) if given is None else given for given in (dbias, dnorm_bias))
    return dx, dbias, dresidual, dweight, dnorm_bias


@operator(
    "residual_add_forward(Tensor x, Tensor? bias, Tensor residual, Tensor? seed, " + _OPTIONS_SCHEMA + ") -> Tensor",
    lambda x, *_: x.new_empty(x.shape),
)
def _add_forward(x: Tensor, bias: Tensor | None, residual: Tensor, seed: Tensor | None, *values: Any) -> Tensor:
    """Return z (T, H)."""
    options = Options(*values)
    if uses_triton(residual, options.kernels):
        from .residual_norm_triton import residual_add_forward as forward
    else:
        forward = residual_add_forward_reference
    return forward(x, bias, residual, seed, options)


def _fake_add_backward(dz: Tensor, bias: Tensor | None, seed: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    dx = dz.new_empty(0 if seed is None else dz.shape)
    return dx, dz.new_empty(0) if bias is None else torch.empty_like(bias)


@operator(
    f"residual_add_backward(Tensor dz, Tensor? bias, Tensor? seed, {_OPTIONS_SCHEMA}) -> (Tensor, Tensor)",
    _fake_add_backward,
)
def _add_backward(dz: Tensor, bias: Tensor | None, seed: Tensor | None, *values: Any) -> tuple[Tensor, Tensor]:
    """Return dx and dbias; dx is empty where it equals dz, dbias where there is no bias."""
    options = Options(*values)
    if uses_triton(dz, options.kernels):
        from .residual_norm_triton import residual_add_backward as backward
    else:
        backward = residual_add_backward_reference
    dx, dbias = backward(dz, bias, seed, options)
    return dz.new_empty(0) if dx is dz else dx, dz.new_empty(0) if dbias is None else dbias


class _ResidualNorm(torch.autograd.Function):
    """`sum_norm_and_amax`; what that has not is None here."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        x, bias, residual, weight, norm_bias, seed, options = arguments
        rows = residual.reshape(-1, residual.shape[-1])
        x_rows = None if x is None else x.reshape(rows.shape)
        sums, y, mean, rstd, amax = _norm_forward(x_rows, bias, rows, weight, norm_bias, seed, *options)
        adds, y = x is not None, reshaped(y, *residual.shape)
        z = reshaped(sums, *residual.shape) if adds else residual.view_as(residual)
        kept = y if options.inverted else z if adds else rows
        saved_mean = None if options.inverted or options.kind == "rms_norm" else mean
        ctx.save_for_backward(*Saved(kept, saved_mean, rstd, weight, norm_bias, bias, seed))
        ctx.options, ctx.adds = options, adds
        ctx.set_materialize_grads(False)
        if options.amax:
            ctx.mark_non_differentiable(amax)
        return z, y, amax if options.amax else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor | None, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        given = dy if dz is None else dz
        if given is None:
            return (None,) * 7
        kept, *others = ctx.saved_tensors
        saved = Saved(kept.reshape(-1, kept.shape[-1]), *others)
        dz_rows = None if dz is None else dz.reshape(saved.kept.shape)
        dy_rows = torch.zeros_like(saved.kept) if dy is None else dy.reshape(saved.kept.shape)
        dx, dbias, dresidual, dweight, dnorm_bias = _norm_backward(dz_rows, dy_rows, *saved, *ctx.options)
        dresidual = dresidual.view(given.shape)
        # without dropout one object for both, so that autograd sees that it is shared
        dx_out = (dresidual if saved.seed is None else dx.view(given.shape)) if ctx.adds else None
        dnorm_bias_out = None if saved.norm_bias is None else dnorm_bias
        return dx_out, None if saved.bias is None else dbias, dresidual, dweight, dnorm_bias_out, None, None


class _ResidualAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, residual: Tensor, seed: Tensor | None, options: Options
    ) -> Tensor:
        ctx.save_for_backward(bias, seed)
        ctx.options = options
        rows = residual.reshape(-1, residual.shape[-1])
        return reshaped(_add_forward(x.reshape(rows.shape), bias, rows, seed, *options), *residual.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        bias, seed = ctx.saved_tensors
        if bias is None and seed is None:
            return dz, None, dz, None, None
        dx, dbias = _add_backward(dz.reshape(-1, dz.shape[-1]), bias, seed, *ctx.options)
        return dz if seed is None else dx.view(dz.shape), None if bias is None else dbias, dz, None, None


class _Dropout(torch.autograd.Function):
    """Dropout is linear, so that forward and backward are what residual_add's backward does to dz."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor, options: Options) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.options = options
        return reshaped(_add_backward(x.reshape(-1, x.shape[-1]), None, seed, *options)[0], *x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (seed,) = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        return _add_backward(rows, None, seed, *ctx.options)[0].view(dy.shape), None, None
