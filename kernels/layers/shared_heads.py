"""Key heads that several processes read: each stores its share of their rows, and gathers those of its head in each pass.

So a parameter has no row on two processes, and norms of gradients, optimizers and checkpoints count each once, at any size.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..parallel.collectives import TensorParallel, gather_from_sequence


class GatheredProjection(NamedTuple):
    """What a product reads of a projection, for this process's heads; fp8: of the projection, which owns it."""

    weight: Tensor
    bias: Tensor | None
    fp8: Any


def gather_heads(qkv: Any, queries: int, keys: int, size: int, parallel: TensorParallel) -> GatheredProjection:
    """Return the rows of this process's queries, of the key head that they read, and of its values.

    qkv: the projection, whose rows are shares of queries, keys and values. queries: N/t. keys: G, of all processes, which share
    them equally. Backward adds up the gradients of all processes that read a row where it is stored.
    """
    own = parallel.rank * keys // parallel.size

    def gathered(shard: Tensor) -> Tensor:
        of_queries, others = shard[: queries * size], shard[queries * size :]
        by_process = gather_from_sequence(others, parallel.group).unflatten(0, (parallel.size, 2, -1))
        heads = by_process.transpose(0, 1).flatten(1, 2).unflatten(1, (keys, size))
        return torch.cat([of_queries, heads[:, own].flatten(0, 1)])

    bias = None if qkv.bias is None else gathered(qkv.bias)
    return GatheredProjection(gathered(qkv.weight), bias, getattr(qkv, "fp8", None))
