"""torch's own attention, backend by backend: what runs on a shape, how fast, and the rows of the benchmarks on the fastest."""

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from bench_device import seconds_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

GPU_BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
SETS = 4  # of inputs in turns, more than the L2 cache of a GPU holds at the large shapes


@dataclass(frozen=True)
class AttentionShape:
    """Attention without anything around it; p: dropout."""

    batch: int
    length: int
    heads: int
    width: int
    causal: bool = False
    p: float = 0.0

    def draw(self, device: torch.device, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Return SETS of qkv (B, S, 3, N, D) and gradients of the output (B, S, N * D); on a CPU one of each."""
        rows, head = (self.batch, self.length), (self.heads, self.width)
        return [
            (
                torch.randn(*rows, 3, *head, device=device, dtype=dtype),
                torch.randn(*rows, self.heads * self.width, device=device, dtype=dtype),
            )
            for _ in range(SETS if device.type == "cuda" else 1)
        ]


def times(
    backend: SDPBackend, shape: AttentionShape, sets: Sequence[tuple[Tensor, Tensor]], bias: Tensor | None = None
) -> tuple[float, float]:
    """Return the seconds of forward and of backward, up to the gradients of q, k and v on their own.

    Raises RuntimeError where this backend does not run on this shape.
    """
    device = sets[0][0].device
    leaves = [
        [part.transpose(1, 2).detach().requires_grad_() for part in qkv.unbind(2)] for qkv, _ in sets
    ]  # views, as a layer has them

    def forward(index: int) -> Tensor:
        return F.scaled_dot_product_attention(*leaves[index], bias, dropout_p=shape.p, is_causal=shape.causal)

    with sdpa_kernel(backend):
        outputs = [forward(index) for index in range(len(sets))]
        douts = [dout.unflatten(2, (shape.heads, shape.width)).transpose(1, 2) for _, dout in sets]

        def backward(index: int) -> tuple[Tensor, ...]:
            return torch.autograd.grad(outputs[index], leaves[index], douts[index], retain_graph=True)

        backward(0)
        turns = itertools.cycle(range(len(sets)))
        return seconds_of(lambda: forward(next(turns)), device), seconds_of(lambda: backward(next(turns)), device)


def by_speed(shape: AttentionShape, device: torch.device, dtype: torch.dtype, bias: Tensor | None) -> dict[str, float]:
    """Return the seconds of forward and backward of every backend that runs on a GPU, fastest first; of none on a CPU."""
    if device.type != "cuda":
        return {}
    sets, found = shape.draw(device, dtype), {}
    for backend in GPU_BACKENDS:
        try:
            found[backend.name] = sum(times(backend, shape, sets, bias))
        except RuntimeError:  # torch's word for a backend that does not take this shape, mask or dropout
            continue
    return dict(sorted(found.items(), key=lambda item: item[1]))


def preferring(names: Sequence[str]) -> AbstractContextManager[None]:
    """Return a context in which torch takes the first of these backends that takes its input; without names, as it chooses."""
    if not names:
        return nullcontext()
    order = [getattr(SDPBackend, name) for name in names]
    return sdpa_kernel([*order, SDPBackend.MATH], set_priority=True)
