import numpy as np
import pytest

from xformer_train.recipes.data.counter_rng import below, hash64, permute, uniform


def test_the_hash_is_that_of_splitmix64():
    # Reference values of SplitMix64 with seed 0, whose first outputs mix the multiples of the golden ratio.
    assert hash64(0)[0] == 0xE220A8397B1DCDAF
    assert hash64(-1).dtype == np.uint64
    assert hash64(-1)[0] == hash64(2**64 - 1)[0]


def test_words_broadcast_and_each_combination_differs():
    grid = hash64(np.arange(50)[:, None], 7, np.arange(40))
    assert grid.shape == (50, 40)
    assert len(np.unique(grid)) == 2000
    assert grid[3, 5] == hash64(3, 7, 5)[0] == hash64(np.array([3]), 7, np.array([5]))[0]
    assert hash64(1, 2)[0] != hash64(2, 1)[0]


def test_uniform_numbers_fill_the_unit_interval_evenly():
    numbers = uniform(5, np.arange(100_000))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    # chi-square with 19 degrees of freedom: 43.8 is passed once in a thousand
    assert ((counts - 5000) ** 2 / 5000).sum() < 43.8


def test_below_takes_every_value_and_a_bound_per_element():
    bounds = np.tile([1, 2, 7], 3000)
    numbers = below(bounds, 3, np.arange(9000))
    assert (numbers < bounds).all()
    assert [sorted(set(numbers[start::3])) for start in range(3)] == [[0], [0, 1], [0, 1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 63, 1000, 65_537])
def test_permute_is_a_bijection_for_every_key(size):
    for key in (0, 1, 2**63 - 1):
        assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


def test_permute_gives_the_same_for_any_grouping_and_mixed_keys():
    index = np.array([5, 1, 5, 999])
    keys = np.array([0, 1, 2, 0])
    together = permute(index, 1000, 9, keys)
    alone = [permute(index[i : i + 1], 1000, 9, int(keys[i]))[0] for i in range(4)]
    assert together.tolist() == alone
    assert together[0] != together[2]


def test_permute_sends_an_index_everywhere_equally_often():
    places = permute(np.zeros(20_000, dtype=np.int64), 10, np.arange(20_000))
    counts = np.bincount(places, minlength=10)
    assert ((counts - 2000) ** 2 / 2000).sum() < 27.9  # 9 degrees of freedom, one in a thousand
    neighbours = permute(np.arange(1000), 1000, 4)
    assert (np.abs(np.diff(neighbours)) == 1).mean() < 0.01
