"""Tensors that all processes draw alike, and the parts of them."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

Triples = Iterator[tuple[str, Tensor, Tensor]]
DTYPES = (torch.float32, torch.float64)
SEED = 1234


def randn(*shape: int, key: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(key), dtype=torch.float64).to(dtype)


def strided(x: Tensor) -> Tensor:
    """The same values, not contiguous."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone(memory_format=torch.preserve_format).requires_grad_()


def part(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    return x.tensor_split(group.size(), dim)[group.rank()]
