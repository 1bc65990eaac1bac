"""The largest magnitude of a tensor, from which an FP8 scale follows."""

import torch
from torch import Tensor


def largest_magnitude(x: Tensor) -> Tensor:
    """Return max |x|, (), fp32; 0 where x is empty."""
    return x.abs().amax().float() if x.numel() else torch.zeros((), device=x.device)
