"""Hide keys from queries by what is added to their scores."""

import torch
from torch import Tensor


def lowest_score(dtype: torch.dtype) -> float:
    """Return what hides a key when it is added to its score: half of the lowest number, as all of it could give -inf."""
    return torch.finfo(dtype).min / 2


def hiding_bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where a query sees a key and `lowest_score` elsewhere, in the shape of `seen`, a bool tensor."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, lowest_score(dtype))
