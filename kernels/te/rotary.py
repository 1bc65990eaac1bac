"""Rotary position embedding: queries and keys turned by angles that grow with the position."""

from collections.abc import MutableMapping

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

# Of angles that RotaryPositionEmbedding gave: their version at that time, cos and sin as `rotary_table` has them.
_TABLES: MutableMapping[Tensor, tuple[int, Tensor]] = WeakTensorKeyDictionary()


class RotaryPositionEmbedding(nn.Module):
    """The angles of rotary position embedding, for `rotary_pos_emb` of `TransformerLayer`.

    dim: D, of a head, or how many of its columns turn; even. base: angles fall from 1 to about 1 / base per position.
    Source: Su et al., RoFormer, arXiv 2104.09864.
    """

    def __init__(self, dim: int, base: float = 10000.0) -> None:
        super().__init__()
        if dim <= 0 or dim % 2:
            raise ValueError(f"dim={dim} is not positive and even; rotary embedding turns pairs of columns")
        self.dim, self.base = dim, base

    def forward(self, max_seq_len: int, device: torch.device | str | None = None) -> Tensor:
        """Return the angle of each position and column, (max_seq_len, 1, 1, dim) fp32; both halves of the columns are equal."""
        frequencies = self.base ** (-torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim)
        angles = torch.arange(max_seq_len, device=device, dtype=torch.float32)[:, None] * frequencies
        result = torch.cat([angles, angles], -1)[:, None, None]
        if not torch.compiler.is_compiling() and not result.is_inference():
            _TABLES[result] = result._version, torch.cat([angles.cos(), angles.sin()], -1)
        return result


def shared_table(angles: tuple[Tensor, Tensor], qkv: Tensor) -> Tensor | None:
    """Return what ops/attention turns queries and keys by, where these angles of both can be told from it; else None.

    They can where both are one tensor that RotaryPositionEmbedding gave for all columns of a head: both halves of its columns
    are then known to be equal. Not in fp64, which that table would round.
    """
    one, other = angles
    if (
        torch.compiler.is_compiling()
        or one is not other
        or one.shape[-1] != qkv.shape[-1]
        or qkv.dtype == torch.float64
    ):
        return None
    version, table = _TABLES.get(one, (None, None))
    return table if version is not None and version == one._version else None


def check_rotary(angles: Tensor, length: int, head_dim: int) -> None:
    """Raise ValueError unless the angles are (S or more, 1, 1, an even number of columns up to D)."""
    shape = tuple(angles.shape)
    fits = (
        len(shape) == 4 and shape[1:3] == (1, 1) and shape[0] >= length and shape[3] <= head_dim and shape[3] % 2 == 0
    )
    if not fits:
        raise ValueError(
            f"rotary_pos_emb is {shape}; it must be (S, 1, 1, columns) with S of {length} or more and an even number of "
            f"columns up to {head_dim}, as RotaryPositionEmbedding gives it"
        )


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Return x with its first columns turned: column i with column i + half of them, by the angle of i.

    x: (..., N, D); angles: (..., 1, columns), broadcastable to x. Computed in fp32 or wider, in the dtype of x.
    """
    columns, wide = angles.shape[-1], torch.promote_types(x.dtype, torch.float32)
    turned, angles = x[..., :columns].to(wide), angles.to(wide)
    first, second = turned.chunk(2, -1)
    turned = turned * angles.cos() + torch.cat([-second, first], -1) * angles.sin()
    return torch.cat([turned.to(x.dtype), x[..., columns:]], -1)
