"""The embedding, and the head with its loss, of a vocabulary whose rows are shared among the processes of a group.

Process r holds rows [r V/t, (r + 1) V/t) of the matrix (V, H), one matrix for both where they are tied. V may include padded
rows at the end.
"""

import functools
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ...errors import UserError
from ...parallel.collectives import (
    Group,
    check_divisible,
    copy_to_group,
    gather_from_sequence,
    group_rank,
    group_size,
    reduce_from_group,
    reduce_scatter_to_sequence,
    start_all_reduce_,
)
from ..choices import IGNORED
from .cross_entropy import chunked_cross_entropy, linear_cross_entropy


def vocab_parallel_embedding(
    input_ids: Tensor, weight: Tensor, group: Group, *, sequence_parallel: bool = False
) -> Tensor:
    """Rows of the full matrix, replicated (S, ..., H), under sequence_parallel this process's part (S/t, ..., H).

    input_ids: (S, ...) int64 in [0, V), replicated; weight: (V/t, H), this process's rows, whose gradient is complete.
    Raises ValueError under sequence_parallel if t does not divide S, and IndexError for ids of no row.
    """
    if group_size(group) == 1:
        return F.embedding(input_ids, weight)
    if sequence_parallel:
        check_divisible(input_ids.shape[0], group, "the sequence, dim 0 of input_ids,")
    vocabulary = _Vocabulary(weight.shape[0], group)
    index, elsewhere = vocabulary.locate(input_ids)
    partial = F.embedding(index, weight).masked_fill(elsewhere[..., None], 0.0)
    return reduce_scatter_to_sequence(partial, group) if sequence_parallel else reduce_from_group(partial, group)


def vocab_parallel_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    group: Group,
    *,
    vocabulary_size: int | None = None,
    sequence_parallel: bool = False,
) -> Tensor:
    """The sum over rows of -log softmax(hidden @ weight.T + bias)[label], as `linear_cross_entropy`, replicated.

    hidden: replicated (T, H), under sequence_parallel this process's (T/t, H); weight: (V/t, H) and bias: (V/t,) or None, this
    process's rows; one float dtype; labels: (T,) int64, replicated; IGNORED rows add nothing.
    vocabulary_size: rows of the full matrix that are tokens; the padded ones behind them get probability 0 and gradient 0;
    None: all rows. The gradient is computed along with the loss, unless gradients are off.
    Raises ValueError if T or the vocabulary do not fit. PyTorch on every device, not Triton: each chunk of logits waits for
    the other processes twice, for its rows' maxima and for their sums.
    """
    shard = _Vocabulary(weight.shape[0], group, vocabulary_size)
    if group_size(group) == 1 and shard.size == weight.shape[0]:
        return linear_cross_entropy(hidden, weight, bias, labels)
    hidden = gather_from_sequence(hidden, group) if sequence_parallel else copy_to_group(hidden, group)
    if hidden.shape[0] != labels.shape[0]:
        raise ValueError(
            f"hidden has {hidden.shape[0]} rows in all, labels has {labels.shape[0]}; give every process the labels of all rows"
        )
    return chunked_cross_entropy(hidden, weight, bias, labels, functools.partial(_softmax_loss_, shard=shard))


@dataclass(frozen=True)
class _Vocabulary:
    """This process's rows of a vocabulary; real_size: rows that are tokens, None: all."""

    rows: int
    group: Group
    real_size: int | None = None

    def __post_init__(self) -> None:
        full = self.rows * group_size(self.group)
        if not 0 < self.size <= full:
            raise UserError(f"vocabulary_size={self.size} is not in 1 .. {full}, the rows of all shards together")

    @property
    def size(self) -> int:
        return self.rows * group_size(self.group) if self.real_size is None else self.real_size

    @property
    def first(self) -> int:
        return self.rows * group_rank(self.group)

    @property
    def real_rows(self) -> int:
        """How many of this process's rows are tokens."""
        return min(max(self.size - self.first, 0), self.rows)

    def locate(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Indices into this process's rows, 0 where another process holds the row, and bool where that is.

        An id that no process holds stays out of range everywhere, so that every process fails, and none waits for the others.
        """
        last = self.first + self.rows
        held = (ids >= 0) & (ids < self.rows * group_size(self.group))
        elsewhere = held & ((ids < self.first) | (ids >= last))
        return (ids - self.first).masked_fill(elsewhere, 0), elsewhere


def _softmax_loss_(logits: Tensor, labels: Tensor, shard: _Vocabulary) -> Tensor:
    """-log softmax(logits)[label] per row, fp32 or wider (rows,), 0 for IGNORED; logits become the gradient of the sum.

    logits: (rows, V/t), labels: (rows,) int64 in the full vocabulary.
    """
    ignored = labels == IGNORED
    index, elsewhere = shard.locate(labels.masked_fill(ignored, 0))
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    wide[:, shard.real_rows :] = -torch.inf
    wide -= start_all_reduce_(wide.amax(1), shard.group, dist.ReduceOp.MAX).wait()[:, None]
    target = wide.gather(1, index[:, None]).squeeze(1).masked_fill_(elsewhere, 0.0)
    wide.exp_()
    total, target = start_all_reduce_(torch.stack([wide.sum(1), target]), shard.group).wait()
    loss = (total.log() - target).masked_fill_(ignored, 0.0)
    wide /= total[:, None]
    wide.scatter_add_(1, index[:, None], elsewhere.to(wide.dtype)[:, None] - 1)
    wide.masked_fill_(ignored[:, None], 0.0)
    if wide is not logits:
        logits.copy_(wide)
    return loss
