"""Rotary position embedding of queries and keys: pairs of a head's columns, turned by angles that grow with the position."""

import torch
from torch import Tensor

from ...errors import UserError


def rotary_table(length: int, dim: int, theta: float, device: torch.device | str | None = None) -> Tensor:
    """Return cos in columns 0 .. dim/2 and sin in dim/2 .. dim of each position's angles, (length, dim) fp32.

    dim: D, of a head, even. theta: angles fall from 1 to about 1 / theta per position. Computed in fp32 in the order of
    transformers, so that its checkpoints see the angles they were trained with. Raises UserError for an odd dim.
    Source: Su et al., RoFormer, arXiv 2104.09864.
    """
    if dim <= 0 or dim % 2:
        raise UserError(
            f"dim={dim} is not positive and even; rotary embedding turns pairs of columns: give an even head dim"
        )
    exponents = torch.arange(0, dim, 2, dtype=torch.int64, device=device).float() / dim
    angles = torch.arange(length, device=device).float()[:, None] * (1 / theta**exponents)
    return torch.cat([angles.cos(), angles.sin()], -1)


def turn(x: Tensor, rotary: Tensor, out: Tensor, *, back: bool = False) -> None:
    """Write x to out, each row turned by the angles of its place, or with back=True turned back.

    x, out: (B, heads, S, D), of any strides, without shared memory. rotary: of `rotary_table`. Computed in fp32 or wider.
    """
    cos, sin = rotary[: x.shape[2]].chunk(2, -1)
    cos, half, sign = torch.cat([cos, cos], -1), x.shape[-1] // 2, -1 if back else 1
    # sequence by sequence, which stays in a CPU's cache; an export would be tied to their number
    for source, target in [(x, out)] if torch.compiler.is_exporting() else zip(x, out, strict=True):
        wide = source.to(torch.promote_types(x.dtype, torch.float32))
        turned = wide * cos
        turned[..., :half].addcmul_(wide[..., half:], sin, value=-sign)
        turned[..., half:].addcmul_(wide[..., :half], sin, value=sign)
        target.copy_(turned)
