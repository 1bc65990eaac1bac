"""Dropout in the attention kernels: its random words, and the mask that they make."""

import math

import pytest
import torch
import triton
import triton.language as tl
from helpers.attention_kernels import SITE, draw_mask

from xformer_train.kernels.ops.attention.attention_dropout_triton import philox_2x32

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")


@triton.jit
def _philox_kernel(counters_ptr, words_ptr, key_ptr, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    c0 = tl.load(counters_ptr + 2 * place).to(tl.uint32)
    c1 = tl.load(counters_ptr + 2 * place + 1).to(tl.uint32)
    r0, r1 = philox_2x32(c0, c1, tl.load(key_ptr).to(tl.uint32))
    tl.store(words_ptr + 2 * place, r0.to(tl.int64))
    tl.store(words_ptr + 2 * place + 1, r1.to(tl.int64))


@pytest.mark.parametrize(("word", "answer"), [(0, [0x257A3673, 0xCD26BE2A]), (0xFFFFFFFF, [0xAB302C4D, 0x3DC9D239])])
def test_random_words_are_those_of_the_authors(word, answer):
    """The known answers of Random123 for philox2x32 with 7 rounds: counter and key of zeros, and of ones."""
    counters = torch.full((2, 2), word, dtype=torch.int64)
    words = torch.empty_like(counters)
    _philox_kernel[(1,)](counters, words, counters, 2)
    assert words.tolist() == [answer, answer]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tile", [(16, 16), (32, 64), (64, 32)])
def test_the_mask_is_the_same_in_every_tile_shape_and_transposed(tile, transposed):
    assert torch.equal(draw_mask(1, 128, 0.3), draw_mask(1, 128, 0.3, tile=tile, transposed=transposed))


def test_decisions_are_independent_and_kept_at_the_promised_rate():
    p, size = 0.3, 256
    mask = draw_mask(4, size, p)
    bound = 4 / math.sqrt(size * size)
    assert abs(mask.mean() - (1 - p)) < bound / 2 * math.sqrt(p * (1 - p))
    centred = (mask - (1 - p)) / math.sqrt(p * (1 - p))
    other_site = (draw_mask(4, size, p, site=SITE + 1) - (1 - p)) / math.sqrt(p * (1 - p))
    assert abs((centred[0] * centred[1]).mean()) < bound
    assert abs((centred[0] * other_site[0]).mean()) < bound
    for shift in (1, 2, 8, 16, 32):  # neighbours share a Philox call eight apart
        for dim in (0, 1):
            assert abs((centred[0] * centred[0].roll(shift, dim)).mean()) < bound
