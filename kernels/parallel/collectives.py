"""Tensor and sequence parallelism over one process group: collectives in conjugate pairs, and the two linear layers.

t is the number of processes in the group. A tensor is *replicated* when every process holds the same, *sharded* when each holds
1/t of it along one dim, in the order of ranks, and *partial* when the sum over the processes is the tensor. The gradient of a
replicated tensor is replicated, that of a sharded one sharded.

A column-parallel layer holds N/t rows of its weight (N, K) and makes a sharded output of a replicated input; a row-parallel
layer holds K/t columns and makes a replicated output of a sharded input. Between the row-parallel layer of one half and the
column-parallel layer of the next, sequence parallelism (SP) shards the activations along dim 0, which must be the sequence:

             forward                       backward, input                  backward, weight
column       -                             all-reduce dx, behind dweight    -
column, SP   all-gather x                  reduce-scatter dx, behind        all-gather x again, behind dx
                                           dweight
row          all-reduce y                  -                                -
row, SP      reduce-scatter y              all-gather dy                    the same dy

A group of None or of one process means no parallelism: no communication and no node in the graph. "Behind" overlaps where the
device lets a collective run beside a product; with NCCL on Hopper that takes CUDA_DEVICE_MAX_CONNECTIONS=1.
Sources: Shoeybi et al., arXiv 1909.08053 (tensor parallelism); Korthikanti et al., arXiv 2205.05198 (SP).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import UserError

# torch 2.13 has new names for these two and warns of the old ones, which are all that torch 2.11 has.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Group = dist.ProcessGroup | None
Compute = Callable[..., Tensor]


def group_size(group: Group) -> int:
    return 1 if group is None else group.size()


def group_rank(group: Group) -> int:
    return 0 if group is None else group.rank()


@dataclass(frozen=True)
class TensorParallel:
    """The processes that share the weights of a layer; none but this one unless given.

    sequence: whether they share its tokens too, between a row-parallel product and the next column-parallel one. Raises
    ValueError for sequence without a group.
    """

    group: Group = None
    sequence: bool = False

    def __post_init__(self) -> None:
        if self.sequence and self.group is None:
            raise UserError(
                "sequence=True divides the tokens over the processes of a group, and there is none; give group or leave it out"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "TensorParallel":
        return self  # a process group cannot be copied, and copies of a layer share it

    @property
    def size(self) -> int:
        return group_size(self.group)

    @property
    def rank(self) -> int:
        return group_rank(self.group)

    @property
    def divides_tokens(self) -> bool:
        """Whether this process holds only a part of the tokens between the products."""
        return self.sequence and self.size > 1


ONE_PROCESS = TensorParallel()


class Pending:
    """A collective under way. Its result must not be read, nor its input overwritten, before `wait`."""

    def __init__(self, result: Tensor, work: dist.Work | None = None) -> None:
        self._result, self._work = result, work

    def wait(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
        return self._result


def start_all_reduce_(x: Tensor, group: Group, op: Any = dist.ReduceOp.SUM) -> Pending:
    """Return x reduced over the group, without autograd.

    The result is in the memory of x if that is contiguous, so use only what `wait` returns.
    """
    if group is None or group.size() == 1:
        return Pending(x)
    result = x.contiguous()
    return Pending(result, dist.all_reduce(result, op, group, async_op=True))


def start_all_gather(x: Tensor, group: Group) -> Pending:
    """Return the x of all processes one after the other along dim 0, without autograd; x: equal shapes everywhere."""
    if group is None or group.size() == 1:
        return Pending(x)
    result = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    return Pending(result, _all_gather(result, x.contiguous(), group, async_op=True))


def start_reduce_scatter(x: Tensor, group: Group) -> Pending:
    """Return this process's part along dim 0 of the sum of x over the group, without autograd.

    Raises ValueError if the processes cannot share dim 0 equally.
    """
    if group is None or group.size() == 1:
        return Pending(x)
    check_divisible(x.shape[0], group, "dim 0 of x")
    result = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    return Pending(result, _reduce_scatter(result, x.contiguous(), group=group, async_op=True))


def check_divisible(size: int, group: Group, name: str) -> None:
    """Raise ValueError if the processes of the group cannot share `size` equally; name: what has that size."""
    if size % group_size(group):
        raise UserError(
            f"{name} is {size}, which the {group_size(group)} processes of the group cannot share equally; pad it to a "
            f"multiple of {group_size(group)} or use another group size"
        )


def copy_to_group(x: Tensor, group: Group) -> Tensor:
    """Return x itself; backward sums dy over the group. Where a replicated tensor enters computations that differ by rank."""
    return x if group_size(group) == 1 else _Conjugates.apply(x, _itself, reduce_from_group, group)


def reduce_from_group(x: Tensor, group: Group) -> Tensor:
    """Return the sum of x over the group; backward passes dy on. Where partial results become a replicated tensor."""
    return x if group_size(group) == 1 else _Conjugates.apply(x, _sum, copy_to_group, group)


def gather_from_sequence(x: Tensor, group: Group) -> Tensor:
    """Return all parts of x along dim 0, (S, ...) of (S/t, ...); backward reduce-scatters dy, which differs by rank."""
    return x if group_size(group) == 1 else _Conjugates.apply(x, _all_parts, reduce_scatter_to_sequence, group)


def reduce_scatter_to_sequence(x: Tensor, group: Group) -> Tensor:
    """Return this process's part along dim 0 of the sum of x, (S/t, ...) of (S, ...); backward all-gathers dy.

    Raises ValueError if t does not divide S.
    """
    return x if group_size(group) == 1 else _Conjugates.apply(x, _own_rows_of_sum, gather_from_sequence, group)


def scatter_to_group(x: Tensor, group: Group, dim: int = -1) -> Tensor:
    """Return this process's part of a replicated x along dim, contiguous; backward all-gathers dy.

    Raises ValueError if t does not divide that dim.
    """
    return x if group_size(group) == 1 else _Conjugates.apply(x, _own_part, gather_from_group, group, dim)


def gather_from_group(x: Tensor, group: Group, dim: int = -1) -> Tensor:
    """Return all parts of x along dim, contiguous and replicated; backward takes this process's part of dy.

    What follows must be computed alike on every process: `gather_from_sequence` is for what differs.
    """
    return x if group_size(group) == 1 else _Conjugates.apply(x, _all_parts, scatter_to_group, group, dim)


def sum_gradient_over(parameter: nn.Parameter, group: Group) -> None:
    """Make every backward sum the parameter's gradient over the group before it is accumulated, and marks the parameter.

    For replicated parameters that act on parts of the sequence, under SP: of LayerNorms, and biases of row-parallel layers.
    Each process then sees the gradient of its own tokens only. Call it once per parameter, and again for a copy: deepcopy
    and to_empty() lose hooks. A module that uses `copy_to_group(parameter, group)` in its forward needs no hook: do not do
    both. The mark `sequence_parallel` says which parameters these are; a training loop that sums marked gradients itself
    would count them t times.
    """
    parameter.sequence_parallel = group_size(group) > 1  # type: ignore[attr-defined]
    if group_size(group) == 1:
        return
    trained = parameter.requires_grad
    parameter.requires_grad_(True)  # torch takes no hook for a frozen parameter, which may be trained later
    parameter.register_hook(lambda gradient: start_all_reduce_(_owned(gradient), group).wait())
    parameter.requires_grad_(trained)


def _owned(x: Tensor) -> Tensor:
    """Return a contiguous copy that a collective may write into."""
    return x.clone(memory_format=torch.contiguous_format)


# Each backward below is the forward of the conjugate, so that the pairs can be differentiated any number of times.


class _Conjugates(torch.autograd.Function):
    """Apply compute(x, *place), without autograd, and conjugate(dy, *place), one of the functions above, in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, compute: Compute, conjugate: Compute, *place: Any) -> Tensor:
        ctx.conjugate, ctx.place = conjugate, place
        return compute(x, *place)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.conjugate(dy, *ctx.place), None, None, *[None] * len(ctx.place)


def _itself(x: Tensor, _: Group) -> Tensor:
    return x.view_as(x)


def _sum(x: Tensor, group: Group) -> Tensor:
    return start_all_reduce_(_owned(x), group).wait()


def _own_rows_of_sum(x: Tensor, group: Group) -> Tensor:
    return start_reduce_scatter(x, group).wait()


def _own_part(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    check_divisible(x.shape[dim], group, f"dim {dim} of x")
    return _owned(x.chunk(group.size(), dim)[group.rank()])


def _all_parts(x: Tensor, group: dist.ProcessGroup, dim: int = 0) -> Tensor:
    gathered = start_all_gather(x, group).wait()
    return gathered if dim in (0, -x.dim()) else torch.cat(gathered.chunk(group.size()), dim)
