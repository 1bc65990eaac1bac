"""The dropout mask of the GPU kernels: its bits, its share, its independence."""

import math

import numpy as np
import pytest
import torch
from helpers.gpu_masks import SEED, gpu_mask

from xformer_train.kernels.ops.dropout import drop_threshold


def philox_words(key, counters, rounds=7):
    """Philox 4x32 of counters (n, 4) uint64-held 32-bit words."""
    c = counters.astype(np.uint64).T
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    low = np.uint64(0xFFFFFFFF)
    for _ in range(rounds):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(b >> np.uint64(32)) ^ c[1] ^ np.uint64(k0), b & low, (a >> np.uint64(32)) ^ c[3] ^ np.uint64(k1), a & low]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, 1)


def test_eight_decisions_come_from_one_philox_call_in_the_documented_order():
    first_row, site, p = 2**33 + 5, 3, 0.3
    mask = gpu_mask(4, 64, p, site, first_row).cpu().numpy()
    for row in range(4):
        number = first_row + row
        counters = np.array([[group, number & 0xFFFFFFFF, number >> 32, site] for group in range(8)])
        words = philox_words(SEED, counters)  # (8, 4)
        halves = np.stack([words & np.uint64(0xFFFF), words >> np.uint64(16)], 2).reshape(-1)
        assert (mask[row] == (halves >= drop_threshold(p))).all()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_promised_share_stays_in_all_and_in_every_eighth_column(p):
    keep = gpu_mask(1024, 1024, p).double()
    deviation = math.sqrt(p * (1 - p) / keep.numel())
    assert abs(keep.mean().item() - (1 - p)) < 4 * deviation + 2**-17
    for half in range(8):
        assert abs(keep[:, half::8].mean().item() - (1 - p)) < 4 * math.sqrt(8) * deviation + 2**-17
    # Row and column counts are as scattered as those of independent draws: chi square of 1024 - 1 degrees of freedom.
    for dim in (0, 1):
        chi_square = ((keep.sum(dim) - 1024 * (1 - p)) ** 2 / (1024 * p * (1 - p))).sum().item()
        assert abs(chi_square - 1024) < 5 * math.sqrt(2 * 1024)


def test_masks_of_other_sites_seeds_rows_and_neighbouring_columns_are_independent():
    first = gpu_mask(256, 512, 0.3)
    others = {
        "site": gpu_mask(256, 512, 0.3, site=3),
        "seed": gpu_mask(256, 512, 0.3, seed=SEED + 1),
        "high word of the seed": gpu_mask(256, 512, 0.3, seed=SEED + 2**32),
        "row": gpu_mask(256, 512, 0.3, first_row=1),
        "high word of the row": gpu_mask(256, 512, 0.3, first_row=2**32),
        "column": first.roll(1, 1),
        "group": first.roll(8, 1),
    }
    for name, other in others.items():
        correlation = torch.corrcoef(torch.stack([first.double().flatten(), other.double().flatten()]))[0, 1]
        assert abs(correlation) < 4 / math.sqrt(first.numel()), name
    assert torch.equal(first[1:], others["row"][:-1])


def test_a_mask_does_not_depend_on_the_width_of_the_tile():
    assert torch.equal(gpu_mask(3, 2048, 0.2)[:, :63], gpu_mask(3, 63, 0.2))
