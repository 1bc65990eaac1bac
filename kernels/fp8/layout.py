"""The form of FP8 operands in memory: padded to what FP8 products take."""

from typing import NamedTuple

import torch
from torch import Tensor

from .alignment import FP8_MULTIPLE


class Fp8Tensor(NamedTuple):
    """An (R, C) tensor in FP8, in the layouts that were asked for. It stands for the FP8 numbers / scale.

    rows: (R, C), empty if not asked for. columns: (C, R'), its transpose, with zeros up to the next multiple of 16 of R.
    scale_inv: (), fp32, 1 / scale.
    """

    rows: Tensor
    columns: Tensor
    scale_inv: Tensor


def padded(size: int) -> int:
    """Return the next multiple of 16."""
    return (size + FP8_MULTIPLE - 1) // FP8_MULTIPLE * FP8_MULTIPLE


def empty_cast(x: Tensor, dtype: torch.dtype, rows: bool, columns: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the results of a cast of x (R, C) without values: rows, columns, amax, 1 / scale."""
    return (
        x.new_empty(x.shape if rows else (0,), dtype=dtype),
        x.new_empty((x.shape[1], padded(x.shape[0])) if columns else (0,), dtype=dtype),
        x.new_empty((), dtype=torch.float32),
        x.new_empty((), dtype=torch.float32),
    )
