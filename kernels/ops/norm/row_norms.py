"""LayerNorm and RMSNorm of rows on the reference path. Sums over a row are fp32 or wider: half precision would lose them."""

import torch
from torch import Tensor

from ..choices import Norm
from .residual_norm_options import Saved


def layer_norm(z: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return y in shape and dtype of z (T, H), mean and rstd (T,) in fp32 or wider."""
    wide = torch.promote_types(z.dtype, torch.float32)
    w, b = weight.to(wide), None if bias is None else bias.to(wide)
    # With wide weights a CPU computes rows of half precision in fp32, statistics too, in one pass. Backward does not: it would
    # add up the weight's gradient in half precision.
    rows = z if z.is_cpu and not torch.compiler.is_exporting() else z.to(wide)
    y, mean, rstd = torch.native_layer_norm(rows, weight.shape, w, b, eps)
    return y.to(z.dtype), mean.flatten(), rstd.flatten()


def rms_norm(z: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return y in shape and dtype of z (..., H), and rstd (...) in fp32 or wider; weight: (H,); out: where y goes.

    z becomes wide before it is multiplied: torch does not vectorize products of two dtypes on a CPU.
    """
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    if torch.compiler.is_exporting():  # torch may differentiate that graph, and nothing in it is overwritten
        rstd = wide.square().mean(-1, keepdim=True).add(eps).rsqrt()
        return (wide * rstd * weight.to(wide.dtype)).to(z.dtype), rstd.squeeze(-1)
    rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(z.shape[-1]).add_(eps).rsqrt_()
    y = torch.mul(wide, rstd, out=out if wide is z else wide).mul_(weight.to(wide.dtype))
    if wide is not z:
        y = y.to(z.dtype) if out is None else out.copy_(y)
    return y, rstd.squeeze(-1)


def norm_gradients(dy: Tensor, saved: Saved, kind: Norm, inverted: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of z (T, H), weight and bias (H,), in fp32 or wider; dy: (T, H).

    Those of weight and bias are not torch's own, whose bits depend on the number of threads, which may change in a run.
    """
    kept, mean, rstd, weight, norm_bias, *_ = saved
    wide = torch.promote_types(kept.dtype, torch.float32)
    z, scale, b = kept.to(wide), weight.to(wide), None if norm_bias is None else norm_bias.to(wide)
    unit, dy = rstd, dy.to(wide)
    if inverted:
        # With x_hat for z, mean 0 and deviation 1, the norm's gradient lacks nothing but the factor rstd.
        z = z / scale if norm_bias is None else (z - norm_bias).div_(scale)
        unit = torch.ones_like(rstd)
    mean = torch.zeros_like(rstd) if mean is None else mean
    dz, *_ = torch.ops.aten.native_layer_norm_backward(
        dy, z, weight.shape, mean[:, None], unit[:, None], scale, b, [True, False, False]
    )
    dweight = unit[None].mm(torch.sub(z, mean[:, None]).mul_(dy))[0]
    dnorm_bias = None if b is None else dy.sum(0)
    if kind == "rms_norm":  # LayerNorm's takes mean(w) away, which has no part in this one
        dz.add_(dy.mv(scale).mul_(unit).div_(z.shape[1])[:, None])
    return dz.mul_(rstd[:, None]) if inverted else dz, dweight, dnorm_bias


def rms_norm_gradients(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Write dx = rstd dy weight - x rstd**3 mean(dy weight x) to out, and return the weight's gradient, (H,).

    dy, x, out: (..., H), rows that may lie apart; rstd: (...), fp32 or wider.
    """
    wide, scale, r = x.to(rstd.dtype), weight.to(rstd.dtype), rstd[..., None]
    dy = dy.to(rstd.dtype)
    products = dy * wide
    shares = products.flatten(0, -2).mv(scale).view(r.shape).mul_(r * r * r).div_(-x.shape[-1])
    dweight = products.mul_(r).flatten(0, -2).sum(0).to(weight.dtype)
    dx = torch.mul(dy, scale, out=out if wide is x else products).mul_(r).addcmul_(wide, shares)
    if wide is not x:
        out.copy_(dx)
    return dweight
