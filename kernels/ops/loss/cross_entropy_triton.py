"""The GPU kernel of cross_entropy.py: loss and gradient of the logits in their place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..choices import IGNORED

_COLUMNS = 4096


@triton.jit
def _softmax_loss_kernel(
    logits_ptr,  # (rows, V), rows stride_row apart; overwritten
    labels_ptr,  # (rows,) int64
    loss_ptr,  # (rows,) fp32 out
    stride_row,
    V: tl.constexpr,
    COLUMNS: tl.constexpr,
    IGNORED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_row
    label = tl.load(labels_ptr + row)
    counts = label != IGNORED
    # no logit belongs to another label: NaN says so without making the host wait
    target = tl.load(logits_ptr + label, mask=(label >= 0) & (label < V), other=float("nan")).to(tl.float32)
    # Every lane keeps the largest value of its own columns and its sum of exponentials relative to that.
    largest = tl.full((COLUMNS,), -3.0e38, tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, V, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        x = tl.load(logits_ptr + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
        new = tl.maximum(largest, x)
        total = total * tl.exp(largest - new) + tl.exp(x - new)
        largest = new
    row_largest = tl.max(largest, 0)
    log_total = tl.log(tl.sum(total * tl.exp(largest - row_largest), 0))
    # The largest logit is taken off before log_total is: their sum would lose the digits of the smaller one.
    tl.store(loss_ptr + row, tl.where(counts, log_total + (row_largest - target), 0.0))
    for start in range(0, V, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        x = tl.load(logits_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)
        d = tl.where(counts, tl.exp(x - row_largest - log_total) - tl.where(columns == label, 1.0, 0.0), 0.0)
        tl.store(logits_ptr + columns, d.to(logits_ptr.dtype.element_ty), mask=columns < V)


def softmax_loss_(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label] per row, fp32 (rows,); overwrites logits with the gradient of the losses' sum.

    logits: (rows, V), last dim contiguous, any float dtype but float64; labels: (rows,) int64 in [0, V) or IGNORED, whose
    rows get loss 0 and gradient 0; with any other label a row's loss is NaN. Maths in fp32.
    """
    rows, V = logits.shape
    assert logits.stride(1) == 1, "the rows of logits must be contiguous"
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _softmax_loss_kernel[(rows,)](
        logits,
        labels.contiguous(),
        loss,
        logits.stride(0),
        V=V,
        COLUMNS=min(_COLUMNS, triton.next_power_of_2(V)),
        IGNORED=IGNORED,
        num_warps=16 if V > _COLUMNS // 2 else 4,
    )
    return loss
