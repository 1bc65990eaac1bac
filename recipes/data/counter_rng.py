"""Random numbers without state: each is a hash of integers that say what it is for, such as (seed, position, purpose).

So any sample can be made at any time, in any order, by any process, with the same result. All functions are vectorised over
their arguments and equal on every machine. The mixing function is the finaliser of SplitMix64 (Steele, Lea, Flood: Fast
Splittable Pseudorandom Number Generators, 2014).
"""

import math

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST_FACTOR = np.uint64(0xBF58476D1CE4E5B9)
_SECOND_FACTOR = np.uint64(0x94D049BB133111EB)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
_FEISTEL_ROUNDS = 6


def hash64(*words: int | np.ndarray) -> np.ndarray:
    """Uniform 64-bit numbers, uint64, one for each combination of words (broadcast; at least one dimension).

    words: integers, taken modulo 2**64.
    """
    state = np.zeros(1, dtype=np.uint64)
    for word in words:
        bits = np.uint64(word & (2**64 - 1)) if isinstance(word, int) else word.astype(np.uint64)
        state = _mix((state + _GOLDEN) ^ bits)
    return state


def _mix(state: np.ndarray) -> np.ndarray:
    first, second, third = _SHIFTS
    state = state ^ (state >> first)
    state *= _FIRST_FACTOR
    state ^= state >> second
    state *= _SECOND_FACTOR
    state ^= state >> third
    return state


def uniform(*words: int | np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1), float64 with 53 random bits, one for each combination of words."""
    return (hash64(*words) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def below(bound: int | np.ndarray, *words: int | np.ndarray) -> np.ndarray:
    """Uniform integers in [0, bound), int64; bound: positive, below 2**52, broadcast with the words."""
    return (uniform(*words) * bound).astype(np.int64)


def permute(index: np.ndarray, size: int, *words: int | np.ndarray) -> np.ndarray:
    """Where a random order of range(size) has each index, int64; a bijection for every value of the words.

    index: int64 in [0, size); words: say which order, broadcast with index. Costs O(1) time and memory per index: a Feistel
    network on the smallest square that holds `size`, walked until it lands inside (Black and Rogaway, Ciphers with
    Arbitrary Finite Domains, 2002). The square is at most 2 sqrt(size) larger, so one walk is nearly always enough.
    """
    side = np.uint64(math.isqrt(size - 1) + 1)
    keys = np.broadcast_to(hash64(*words), index.shape)
    values = index.astype(np.uint64)
    walking = np.arange(len(values))
    while len(walking):
        left, right = values[walking] // side, values[walking] % side
        for turn in range(_FEISTEL_ROUNDS):
            # Halved, so that the sum cannot wrap, which would break the bijection.
            left, right = right, (left + (hash64(keys[walking], turn, right) >> np.uint64(1))) % side
        values[walking] = left * side + right
        walking = walking[values[walking] >= size]
    return values.astype(np.int64)
