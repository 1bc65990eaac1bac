import itertools

import pytest

from xformer_train.launcher.config.batch import BatchPlan, divisors, nearest_plans, solve_batch
from xformer_train.launcher.config.schema import TrainingConfig

KEYS = ("train_batch_size", "micro_batch_size", "gradient_accumulation_steps")


def training(train=None, micro=None, accumulation=None):
    return TrainingConfig(train_batch_size=train, micro_batch_size=micro, gradient_accumulation_steps=accumulation)


@pytest.mark.parametrize("micro,accumulation,world_size", list(itertools.product((1, 3, 64), (1, 2, 7), (1, 2, 5))))
def test_any_two_keys_give_the_third(micro, accumulation, world_size):
    plan = BatchPlan(micro * accumulation * world_size, micro, accumulation, world_size)
    values = {key: getattr(plan, key) for key in KEYS}
    for left_out in (None, *KEYS):
        given = {key: value for key, value in values.items() if key != left_out}
        assert solve_batch(TrainingConfig(**given), world_size) == plan


def test_one_batch_size_alone_means_no_accumulation():
    assert solve_batch(training(train=12), 4) == BatchPlan(12, 3, 1, 4)
    assert solve_batch(training(micro=3), 4) == BatchPlan(12, 3, 1, 4)


@pytest.mark.parametrize("accumulation", [None, 2])
def test_without_a_batch_size_the_error_names_the_keys_to_give(accumulation):
    with pytest.raises(ValueError, match=r"training\.train_batch_size.*training\.micro_batch_size"):
        solve_batch(training(accumulation=accumulation), 2)


@pytest.mark.parametrize(
    "keys,world_size,message",
    [
        ((10, 3, None), 1, "got 10, must be a multiple of micro_batch_size 3 times 1 replica; .* 9 = 3 x 3 x 1"),
        ((10, None, None), 4, "got 10, must be a multiple of 4 replicas; .* 8 = 2 x 1 x 4; 12 = 3 x 1 x 4"),
        ((100, None, 3), 8, "must be a multiple of gradient_accumulation_steps 3 times 8 replicas"),
        ((32, 8, 3), 2, "got 32, must be 48, which is micro_batch_size 8 times gradient_accumulation_steps 3 times 2"),
        ((2, 8, None), 1, "got 2, .* 2 = 2 x 1 x 1; 8 = 8 x 1 x 1"),
        ((3, None, None), 8, "got 3, .* 8 = 1 x 1 x 8"),
    ],
)
def test_a_contradiction_names_the_values_and_the_nearest_that_fit(keys, world_size, message):
    with pytest.raises(ValueError, match=message):
        solve_batch(training(*keys), world_size)


@pytest.mark.parametrize(
    "train,micro,accumulation,world_size", list(itertools.product((7, 100), (3, None), (4, None), (1, 6)))
)
def test_every_suggestion_is_itself_accepted(train, micro, accumulation, world_size):
    for plan in nearest_plans(training(train, micro, accumulation), world_size):
        suggested = training(plan.train_batch_size, plan.micro_batch_size, plan.gradient_accumulation_steps)
        assert solve_batch(suggested, world_size) == plan


@pytest.mark.parametrize("number", [1, 2, 36, 97, 1022, 10**12 - 11])
def test_all_divisors_of_a_number_are_found_in_order(number):
    found = divisors(number)
    assert found == sorted(set(found)) and all(number % size == 0 for size in found)
    assert number > 2000 or found == [size for size in range(1, number + 1) if number % size == 0]


def test_the_largest_numbers_have_their_small_divisors():
    assert divisors(2**63 - 2)[:4] == [1, 2, 3, 6]
    assert nearest_plans(training(2**63 - 2, 5), 1)[0] == BatchPlan(2**63 - 2, 6, (2**63 - 2) // 6, 1)


def test_suggestions_for_a_huge_batch_come_at_once():
    # 10**12 has few divisors; trying every number up to it would take hours.
    plans = nearest_plans(training(10**12, 7), 1)
    assert BatchPlan(10**12, 8, 10**12 // 8, 1) in plans
