"""The dropout mask as the GPU kernels draw it."""

import os

import torch
import triton
import triton.language as tl

from xformer_train.kernels.ops.dropout import drop_threshold
from xformer_train.kernels.ops.dropout_triton import keep_rows

SEED = 2**62 + 987654321
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _mask_kernel(
    mask_ptr, seed_ptr, site, threshold, first_row, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # mask: (ROWS, COLUMNS) int8 out
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    keep = keep_rows(tl.load(seed_ptr), site, first_row + rows.to(tl.int64), ROWS, COLUMNS, threshold)
    tl.store(mask_ptr + rows[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], keep.to(tl.int8))


def gpu_mask(num_rows, columns, p, site=2, first_row=0, seed=SEED):
    """The mask that the kernels draw, int8 (num_rows, columns)."""
    num_tiled, width = triton.next_power_of_2(num_rows), max(8, triton.next_power_of_2(columns))
    # the interpreter is slow per program, a GPU holds a tile in registers
    tile = num_tiled if INTERPRETED else min(num_tiled, max(1, 4096 // width))
    mask = torch.empty(num_tiled, width, dtype=torch.int8)
    grid = (num_tiled // tile,)
    _mask_kernel[grid](mask, torch.tensor(seed), site, drop_threshold(p), first_row, ROWS=tile, COLUMNS=width)
    return mask[:num_rows, :columns].contiguous()
