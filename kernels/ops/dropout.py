"""Dropout decisions as a pure function of (seed, site, shape), so that backward can draw them again instead of storing them.

Each decision takes 16 random bits: an element is dropped when its bits fall below round(p * 65536), and the kept ones are
scaled by 65536 / (65536 - round(p * 65536)), so that the expected value is exact and the rate is off by at most 2**-17.
"""

import math

import torch
from torch import Tensor

_LEVELS = 65536  # 16 bits a decision, so that one 64-bit word decides on four elements


def _int64(value: int) -> int:
    """Return the low 64 bits of value as torch's signed integer holds them."""
    return (value + 2**63) % 2**64 - 2**63


# The increment and the multipliers of SplitMix64, Steele et al., Fast Splittable Pseudorandom Number Generators (OOPSLA 2014)
_GAMMA, _MIX_1, _MIX_2 = (_int64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_SITE_STRIDE = 0xD1B54A32D192ED03  # far from every small multiple of the increment, so sites never share words


def draw_seed(device: torch.device, shape: tuple[int, ...] = ()) -> Tensor:
    """Return fresh dropout seeds, int64, from torch's default generator of `device`.

    Taken from the default generator so that `torch.manual_seed`, a restored generator state and `torch.utils.checkpoint`
    reproduce the masks of a whole layer without knowing about them.
    """
    return torch.randint(0, 2**63 - 1, shape, dtype=torch.int64, device=device)


def drop_threshold(p: float) -> int:
    """Return the number of 65536 equally likely 16-bit values that drop an element at dropout probability p."""
    return min(round(p * _LEVELS), _LEVELS - 1)


def keep_scale(p: float) -> float:
    """Return the factor of the kept elements at dropout probability p."""
    return _LEVELS / (_LEVELS - drop_threshold(p))


def keep_mask(shape: torch.Size, p: float, seed: Tensor, site: int) -> Tensor:
    """Return which elements stay, int16 of 1 and 0 with the given shape on the device of `seed`.

    seed: int64 scalar tensor; site: small int that tells the dropouts of one layer apart. Equal arguments give equal masks,
    on every device. Integers and not bool because multiplying by them is faster on a CPU.
    """
    threshold = drop_threshold(p) - _LEVELS // 2
    if threshold == -_LEVELS // 2:
        return torch.ones(shape, dtype=torch.int16, device=seed.device)
    count = math.prod(shape)
    words = _random_words(torch.arange((count + 3) // 4, device=seed.device), seed, site)
    return _kept(words.view(torch.int16)[:count], threshold).view(shape)


def keep_mask_of_block(shape: torch.Size, rows: slice, columns: slice, p: float, seed: Tensor, site: int) -> Tensor:
    """Return keep_mask(shape, p, seed, site)[:, rows, columns], where shape has three dims, without drawing the rest."""
    width = columns.stop - columns.start
    threshold = drop_threshold(p) - _LEVELS // 2
    if threshold == -_LEVELS // 2:
        return torch.ones((shape[0], rows.stop - rows.start, width), dtype=torch.int16, device=seed.device)
    places = torch.arange(shape[0], device=seed.device)[:, None] * shape[1]
    places = (places + torch.arange(rows.start, rows.stop, device=seed.device))[:, :, None] * shape[2] + columns.start
    words = _random_words((places >> 2) + torch.arange((width + 6) // 4, device=seed.device), seed, site)
    bits = words.view(torch.int16)
    if shape[2] % 4 == 0:  # all rows start at the same decision of a word
        bits = bits[:, :, columns.start % 4 :][:, :, :width]
    else:
        bits = bits.gather(2, (places & 3) + torch.arange(width, device=seed.device))
    return _kept(bits, threshold)


def _kept(bits: Tensor, threshold: int) -> Tensor:
    """Return bits >= threshold as 1 and 0, in their place."""
    # min(max(bits, t - 1), t) - (t - 1) takes two passes of plain SIMD; a comparison takes five times as long
    return bits.clamp_(threshold - 1, threshold).sub_(threshold - 1)


def _random_words(places: Tensor, seed: Tensor, site: int) -> Tensor:
    """Return int64 in the place of `places`, a hash of key + i * increment for each i: SplitMix64 with torch's operators.

    torch shifts keep the sign, so x ^ (x >> 30) loses the top bit, which the multiplication refills from below; the last
    step adds instead of xor, or every word's top bit would be 0.
    """
    words = places.mul_(_GAMMA).add_(seed + _int64(site * _SITE_STRIDE))
    words.bitwise_xor_(words >> 30).mul_(_MIX_1)
    words.bitwise_xor_(words >> 27).mul_(_MIX_2)
    return words.add_(words >> 31)
