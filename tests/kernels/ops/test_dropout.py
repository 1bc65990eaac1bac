"""The masks of dropout as random numbers: share, spread and independence, over about a million decisions each.

Bounds are four standard errors, which a right generator passes with probability 0.99994. Arguments are fixed, so a test that
passes once always passes; only another generator draws anew.
"""

import itertools
import math

import pytest
import torch

from xformer_train.kernels.ops.dropout import draw_seed, keep_mask

N = 2**20
SEED = torch.tensor(20_240_607_123_456_789)
PROBABILITIES = [0.1, 0.5, 0.003]
FREQUENT = [0.1, 0.5]  # at 0.003 two masks drop nine elements in common, too few for a bound of normal deviates


def mask_of(shape, p, seed=SEED, site=1):
    return keep_mask(torch.Size(shape), p, seed, site)


def correlation(first, second):
    return torch.corrcoef(torch.stack([first.flatten(), second.flatten()]).double())[0, 1].item()


def assert_chi_square(kept, trials, p):
    """That the counts `kept`, each of `trials` decisions, scatter as independent decisions do: not more, and not less.

    The sum of their squared standard scores has mean len(kept) and variance len(kept) * (2 + excess), where excess is that
    of one binomial count, (1 - 6 p (1 - p)) / (trials p (1 - p)).
    """
    variance = trials * p * (1 - p)
    statistic = ((kept.double() - trials * (1 - p)).square().sum() / variance).item()
    spread = math.sqrt(len(kept) * (2 + (1 - 6 * p * (1 - p)) / variance))
    assert abs(statistic - len(kept)) < 4 * spread


@pytest.mark.parametrize("shape", [(1,), (63,), (1000,), (3, 5, 7, 11), (0, 4)])
def test_a_mask_is_integers_0_and_1_of_the_shape_asked_for_and_repeatable(shape):
    mask = mask_of(shape, 0.4)
    assert not mask.is_floating_point()
    assert mask.shape == shape
    assert ((mask == 0) | (mask == 1)).all()
    assert torch.equal(mask, mask_of(shape, 0.4))


@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 2])
def test_the_keep_rate_holds_for_every_kind_of_seed(p, seed):
    kept = mask_of((N,), p, torch.tensor(seed)).double().mean().item()
    assert abs(kept - (1 - p)) < 4 * math.sqrt(p * (1 - p) / N)


@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("shape", [(1024, 1024), (1361, 769), (N // 8, 8), (8, N // 8)])
def test_decisions_scatter_over_rows_and_columns_as_independent_ones(p, shape):
    """Rows of 8 have one column for each decision that a block of 128 random bits can give, at 16 bits a decision."""
    mask = mask_of(shape, p)
    assert_chi_square(mask.sum(1, dtype=torch.int64), shape[1], p)
    assert_chi_square(mask.sum(0, dtype=torch.int64), shape[0], p)


@pytest.mark.parametrize("p", FREQUENT)
def test_masks_of_different_seeds_and_sites_are_uncorrelated(p):
    """Sites as a layer has them, seeds that differ in one bit, by one, or by everything; each pair of the masks."""
    masks = [mask_of((N,), p, SEED, site) for site in (1, 2, 3)]
    masks += [mask_of((N,), p, torch.tensor(int(SEED) ^ bit), 1) for bit in (1, 2**31, 2**32, 2**62)]
    masks += [mask_of((N,), p, torch.tensor(seed), 1) for seed in (0, 1)]
    for first, second in itertools.combinations(masks, 2):
        assert abs(correlation(first, second)) < 4 / math.sqrt(N)


@pytest.mark.parametrize("p", FREQUENT)
def test_neighbours_in_a_mask_are_uncorrelated(p):
    """In order of memory, at every distance within two blocks of eight, and at the distances of rows and attention heads."""
    heads, size = 16, 256
    mask = mask_of((heads, size, size), p).flatten()
    for distance in (*range(1, 17), size, size + 1, 4 * size, size * size, 4 * size * size):
        first, second = mask[:-distance], mask[distance:]
        assert abs(correlation(first, second)) < 4 / math.sqrt(len(first))


def test_passes_draw_different_seeds_and_a_restored_generator_draws_them_again():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    seeds = [draw_seed(torch.device("cpu")) for _ in range(1000)]
    assert len({int(seed) for seed in seeds}) == len(seeds)
    torch.set_rng_state(state)
    assert [int(draw_seed(torch.device("cpu"))) for _ in range(3)] == [int(seed) for seed in seeds[:3]]
