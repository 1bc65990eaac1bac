"""The norm modules of layers and models."""

from torch import nn

from ..ops.choices import Norm


def make_norm(size: int, eps: float, norm: Norm, bias: bool) -> nn.LayerNorm | nn.RMSNorm:
    """Return a new norm over the last dim, of `size`; bias: whether a LayerNorm has one, which an RMSNorm never has."""
    if norm == "rms_norm":
        return nn.RMSNorm(size, eps=eps)
    return nn.LayerNorm(size, eps=eps, bias=bias)
