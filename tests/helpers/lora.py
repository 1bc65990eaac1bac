"""Low-rank adapters, as libraries put them in the place of linear modules."""

import torch
from torch import Tensor, nn


class Lora(nn.Module):
    """base(x) + x @ A.T @ B.T; the base is frozen, and neither A nor B is zero."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, base.in_features, dtype=base.weight.dtype))
        self.B = nn.Parameter(torch.randn(base.out_features, rank, dtype=base.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.A.T @ self.B.T


def adapt(module: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """The module, with adapters in the place of all linear modules of these names inside it."""
    torch.manual_seed(7)
    for owner in list(module.modules()):
        for name in names:
            if isinstance(getattr(owner, name, None), nn.Linear):
                setattr(owner, name, Lora(getattr(owner, name)))
    return module


def adapters(module: nn.Module) -> list[nn.Parameter]:
    """The A and B of all adapters inside."""
    return [parameter for one in module.modules() if isinstance(one, Lora) for parameter in (one.A, one.B)]
