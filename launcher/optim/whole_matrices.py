"""Matrices of which processes hold parts: each is put together on one process, and what becomes of it is handed back."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels.parallel.sharding import Partition
from ..processes.topology import Topology
from .newton_schulz import flops
from .slices import Slice


class Matrix(NamedTuple):
    """One matrix inside a parameter.

    rows, columns: whole. share: (rows, columns) of what one of the processes that divide the parameter holds, which begins at
    `start` in its parameter, flattened.
    """

    rows: int
    columns: int
    share: tuple[int, int]
    start: int

    def joined(self, shares: Tensor) -> Tensor:
        """Return the matrix (rows, columns) of its shares (processes, numel of a share)."""
        by_process = shares.view(-1, *self.share)
        if self.share[1] == self.columns:
            return by_process.reshape(self.rows, self.columns)
        return by_process.transpose(0, 1).reshape(self.rows, self.columns)

    def divided(self, whole: Tensor) -> Tensor:
        """Return the shares (processes, numel of a share) of the matrix."""
        if self.share[1] == self.columns:
            return whole.reshape(self.rows // self.share[0], -1)
        return whole.view(self.rows, -1, self.share[1]).transpose(0, 1).reshape(-1, self.rows * self.share[1])


def matrices_in(shape: Sequence[int], partition: Partition, sharers: int) -> list[Matrix]:
    """Return the matrices of a parameter, those without elements left out.

    shape: (rows, columns) that one process holds. sharers: processes that divide the parameter.
    """
    rows, columns = shape
    if partition.dim == 1:
        found = [Matrix(rows, columns * sharers, (rows, columns), 0)]
    else:
        parts = partition.parts or (rows * sharers,)
        starts = [sum(parts[:number]) // sharers * columns for number in range(len(parts))]
        found = [Matrix(part, columns, (part // sharers, columns), at) for part, at in zip(parts, starts, strict=True)]
    return [matrix for matrix in found if matrix.rows * matrix.columns]


class Part(NamedTuple):
    """A part of a matrix in one process's tensor: both flattened, numel elements from `start` there, `offset` in its share.

    matrix, tensor: their numbers in the step.
    """

    matrix: int
    tensor: int
    start: int
    offset: int
    numel: int


class Exchange:
    """Who holds what of the matrices of one step, and which process has each whole, the same table on all processes.

    The work is shared out by floating-point operations. Each way is one `all_to_all`, none where no process needs a part of
    another one.
    """

    def __init__(
        self, matrices: Sequence[Matrix], held: Sequence[Sequence[Part]], topology: Topology | None, *, replicated: bool
    ) -> None:
        """Take the parts that each process holds, by rank.

        replicated: whether replicas of the model hold the same, so that a process needs parts of its own replica alone.
        """
        self.matrices = matrices
        self._device = None if topology is None else topology.device
        rank, self._sharers = (0, 1) if topology is None else (topology.rank, topology.tensor_parallel)
        owners = _shared_out([flops(matrix.rows, matrix.columns) for matrix in matrices], len(held))
        self.own = [number for number, owner in enumerate(owners) if owner == rank]

        def needed(holder: int, owner: int) -> bool:
            return not replicated or holder // self._sharers == owner // self._sharers

        ranks = range(len(held))
        self._returned = [[part for part in held[other] if owners[part.matrix] == rank] for other in ranks]
        self._arriving = [[part for part in held[rank] if owners[part.matrix] == other] for other in ranks]
        self._sent = [self._arriving[other] if needed(rank, other) else [] for other in ranks]
        self._received = [self._returned[other] if needed(other, rank) else [] for other in ranks]
        away = {(holder, owners[part.matrix]) for holder in ranks for part in held[holder]} - {(i, i) for i in ranks}
        self._crosses, self._crosses_back = any(needed(*pair) for pair in away), bool(away)

    def collect(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the matrices `own`, whole, of the flattened tensors of the step, on the device of the run."""
        sent = [tensors[part.tensor].narrow(0, part.start, part.numel) for parts in self._sent for part in parts]
        pieces = self._swapped(sent, self._sent, self._received, self._crosses, tensors)
        by_matrix: dict[int, list[tuple[int, Part, Tensor]]] = {number: [] for number in self.own}
        received = [(rank, part) for rank, parts in enumerate(self._received) for part in parts]
        for (rank, part), piece in zip(received, pieces, strict=True):
            by_matrix[part.matrix].append((rank % self._sharers, part, piece))
        return [self._joined(self.matrices[number], found) for number, found in by_matrix.items()]

    def hand_back(self, wholes: Sequence[Tensor], tensors: Sequence[Tensor]) -> Iterator[tuple[Part, Tensor]]:
        """Yield each part that this process holds, with its elements of what became of the matrices; wholes: of `own`."""
        shares = {number: self.matrices[number].divided(whole) for number, whole in zip(self.own, wholes, strict=True)}
        sent = [
            shares[part.matrix][rank % self._sharers].narrow(0, part.offset, part.numel)
            for rank, parts in enumerate(self._returned)
            for part in parts
        ]
        pieces = self._swapped(sent, self._returned, self._arriving, self._crosses_back, tensors)
        arrived = [part for parts in self._arriving for part in parts]
        for part, piece in zip(arrived, pieces, strict=True):
            yield part, piece.to(tensors[part.tensor].device)

    def _joined(self, matrix: Matrix, found: Sequence[tuple[int, Part, Tensor]]) -> Tensor:
        if len(found) == 1 and self._sharers == 1:
            return found[0][2].view(matrix.rows, matrix.columns)
        shares = found[0][2].new_empty(self._sharers, matrix.share[0] * matrix.share[1])
        for sharer, part, piece in found:
            shares[sharer].narrow(0, part.offset, part.numel).copy_(piece)
        return matrix.joined(shares)

    def _swapped(
        self,
        pieces: list[Tensor],
        sent: Sequence[Sequence[Part]],
        received: Sequence[Sequence[Part]],
        crosses: bool,
        tensors: Sequence[Tensor],
    ) -> Sequence[Tensor]:
        """Return the pieces that the processes have for this one, in order of rank."""
        device = self._device or tensors[0].device
        if not crosses:
            return [piece.to(device) for piece in pieces]
        flat = torch.cat([piece.to(device) for piece in pieces]) if pieces else tensors[0].new_empty(0, device=device)
        sizes = [part.numel for parts in received for part in parts]
        arrived = flat.new_empty(sum(sizes))
        incoming, outgoing = ([sum(part.numel for part in parts) for parts in each] for each in (received, sent))
        dist.all_to_all_single(arrived, flat, incoming, outgoing)
        return arrived.split(sizes)


def parts_held(slices: Sequence[Slice], matrices: Mapping[int, Sequence[tuple[int, Matrix]]]) -> list[Part]:
    """Return the parts of matrices in the tensors of a step; matrices: of each parameter, with their numbers in the step."""
    return [
        Part(number, tensor, start + low - offset, low - matrix.start, high - low)
        for tensor, own in enumerate(slices)
        for place, start, offset, numel in own.segments
        for number, matrix in matrices[place]
        for low in [max(offset, matrix.start)]
        for high in [min(offset + numel, matrix.start + matrix.share[0] * matrix.share[1])]
        if low < high
    ]


def _shared_out(costs: Sequence[int], workers: int) -> list[int]:
    """Return a worker for each cost: the largest goes first, to whoever has the least so far."""
    loads, owners = [0] * workers, [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        owner = loads.index(min(loads))
        owners[number] = owner
        loads[owner] += costs[number]
    return owners
