"""LayerNorm and RMSNorm of rows on the reference path. Sums over a row are fp32 or wider: half precision would lose them."""

import torch
from torch import Tensor

from .residual_norm_options import Saved


def layer_norm(z: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return y in shape and dtype of z (T, H), mean and rstd (T,) in fp32 or wider."""
    wide = torch.promote_types(z.dtype, torch.float32)
    b = None if bias is None else bias.to(wide)
    y, mean, rstd = torch.native_layer_norm(z.to(wide), weight.shape, weight.to(wide), b, eps)
    return y.to(z.dtype), mean.flatten(), rstd.flatten()


def layer_norm_gradients(dy: Tensor, saved: Saved, inverted: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of z (T, H), weight and bias (H,), in fp32 or wider; dy: (T, H)."""
    kept, mean, rstd, weight, norm_bias, *_ = saved
    wide = torch.promote_types(kept.dtype, torch.float32)
    z, scale = kept.to(wide), weight.to(wide)
    if inverted:
        # With x_hat for z, mean 0 and deviation 1, the norm's gradient lacks nothing but the factor rstd.
        z = z / scale if norm_bias is None else (z - norm_bias).div_(scale)
        mean, unit = torch.zeros_like(rstd), torch.ones_like(rstd)
    else:
        assert mean is not None, "a norm that is not inverted saves its means"
        unit = rstd
    b = None if norm_bias is None else norm_bias.to(wide)
    dz, dweight, dnorm_bias = torch.ops.aten.native_layer_norm_backward(
        dy.to(wide), z, weight.shape, mean[:, None], unit[:, None], scale, b, [True, True, b is not None]
    )
    return dz.mul_(rstd[:, None]) if inverted else dz, dweight, dnorm_bias


def rms_norm(z: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return y in shape and dtype of z (T, H), and rstd (T,) in fp32 or wider; weight: (H,)."""
    wide = torch.promote_types(z.dtype, torch.float32)
    length = torch.linalg.vector_norm(z, dim=-1, keepdim=True, dtype=wide)
    rstd = length.square().div_(z.shape[-1]).add_(eps).rsqrt_()
    return (z * rstd).mul_(weight).to(z.dtype), rstd.flatten()


def rms_norm_gradients(dy: Tensor, saved: Saved, inverted: bool) -> tuple[Tensor, Tensor]:
    """Return the gradients of z (T, H) and weight (H,), in fp32 or wider; dy: (T, H)."""
    kept, wide = saved.kept, torch.promote_types(saved.kept.dtype, torch.float32)
    scale, rstd = saved.weight.to(wide), saved.rstd[:, None]
    x_hat = kept / scale if inverted else kept * rstd
    products = dy * x_hat
    shares = products.mv(scale).div_(-kept.shape[1])
    dz = x_hat.mul_(shares[:, None]).addcmul_(dy.to(wide), scale).mul_(rstd)
    return dz, products.sum(0)
