import itertools
import math

import pytest

from xformer_train.launcher.config.schema import ScheduleConfig
from xformer_train.launcher.optim.schedule import learning_rate, warmup_length

ALL_TYPES = ["EE", "LE", "EP", "linear", "cosine", "constant", "wsd"]
T = 1000


def curve(schedule, base_lr=1.0, total_steps=T, steps=range(T + 1)):
    return [learning_rate(schedule, base_lr, total_steps, step) for step in steps]


@pytest.mark.parametrize("step", [0, 1, 13, 449, 450, 451, 700, 1234, 7499, 7500, 9000])
def test_the_deepspeed_bert_schedules_follow_their_formulas(step):
    total, warmup, rate, interval, base, offset = 7500, 0.06, 0.9, 250, 11e-3, 10e-4
    x = step / total
    decay = rate ** ((step - total * warmup) / interval)
    expected = {
        "EE": (x / warmup) ** 2 if x < warmup else decay,
        "LE": x / warmup if x < warmup else decay,
        "EP": (x / warmup) ** 1.5 if x < warmup else (1 - x) ** 2 if x < 1 else 0.0,
    }
    for kind, factor in expected.items():
        schedule = ScheduleConfig(
            type=kind, warmup_proportion=warmup, decay_rate=rate, decay_steps=interval, lr_offset=offset
        )
        assert learning_rate(schedule, base, total, step) == pytest.approx(base * factor + offset, rel=1e-12)


def test_the_peak_is_base_plus_offset_and_step_zero_runs_at_the_offset():
    schedule = ScheduleConfig(type="EE", warmup_proportion=0.06, decay_rate=0.9, decay_steps=250, lr_offset=10e-4)
    rates = curve(schedule, 11e-3, 7500, range(7500))
    assert rates[0] == 10e-4
    assert max(rates) == rates[450] == pytest.approx(12e-3, rel=1e-12)


@pytest.mark.parametrize("step", [0, 1, 99, 100, 101, 550, 800, 801, 999, 1000, 2000])
def test_the_other_schedules_follow_their_formulas(step):
    warmup = 100
    ramp = min(step / warmup, 1.0)
    progress = min(max((step - warmup) / (T - warmup), 0.0), 1.0)
    expected = {
        "linear": ramp * (1 - progress),
        "cosine": ramp * (0.5 + 0.5 * math.cos(math.pi * progress)),
        "constant": ramp,
        "wsd": ramp * min(max(T - step, 0) / 200, 1.0),
    }
    for kind, factor in expected.items():
        schedule = ScheduleConfig(type=kind, warmup_steps=warmup, decay_proportion=0.2)
        assert learning_rate(schedule, 3.0, T, step) == pytest.approx(3.0 * factor, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("kind", ALL_TYPES)
@pytest.mark.parametrize("warmup", [{}, {"warmup_steps": 0}, {"warmup_steps": 137}, {"warmup_proportion": 0.3333}])
def test_rates_are_never_negative_nor_above_base_plus_offset(kind, warmup):
    rates = curve(ScheduleConfig(type=kind, lr_offset=0.25, **warmup), steps=range(0, 3 * T))
    assert min(rates) >= 0.25
    assert max(rates) <= 1.25


@pytest.mark.parametrize("kind", ["EE", "LE", "linear", "cosine", "constant", "wsd"])
def test_rates_of_neighbouring_steps_are_near_each_other(kind):
    rates = curve(ScheduleConfig(type=kind, warmup_proportion=0.1, decay_rate=0.9, decay_steps=50), steps=range(2 * T))
    assert max(abs(b - a) for a, b in itertools.pairwise(rates)) <= 2.1 / 100  # steepest: (t/100)² at its end


def test_ep_drops_where_its_warmup_ends_as_the_original_does():
    rates = curve(ScheduleConfig(type="EP", warmup_proportion=0.1))
    assert rates[99] == pytest.approx(0.99**1.5)
    assert rates[100] == pytest.approx(0.81)


@pytest.mark.parametrize("kind", ALL_TYPES)
def test_without_warmup_the_first_step_runs_at_the_full_rate(kind):
    assert learning_rate(ScheduleConfig(type=kind), 0.5, T, 0) == 0.5


@pytest.mark.parametrize("kind", ["EE", "LE"])
def test_without_warmup_the_exponential_decay_starts_at_step_zero(kind):
    schedule = ScheduleConfig(type=kind, decay_rate=0.9, decay_steps=100)
    assert learning_rate(schedule, 1.0, T, 200) == pytest.approx(0.81)


@pytest.mark.parametrize("kind", ["EP", "linear", "cosine", "wsd"])
def test_schedules_that_end_at_zero_stay_there(kind):
    rates = curve(ScheduleConfig(type=kind, warmup_steps=10, lr_offset=0.125), steps=[T - 1, T, T + 1, 10 * T])
    assert rates[0] > 0.125
    assert rates[1:] == [0.125] * 3


@pytest.mark.parametrize("kind", ALL_TYPES)
def test_a_run_shorter_than_its_warmup_only_rises(kind):
    rates = curve(ScheduleConfig(type=kind, warmup_steps=50, decay_proportion=0.0), total_steps=20, steps=range(20))
    assert rates == sorted(rates) and rates[19] > rates[0]


def test_warmup_over_the_whole_run_is_no_division_by_zero():
    for kind in ALL_TYPES:
        assert all(math.isfinite(rate) for rate in curve(ScheduleConfig(type=kind, warmup_proportion=1.0)))


def test_warmup_and_decay_of_wsd_may_meet():
    rates = curve(ScheduleConfig(type="wsd", warmup_proportion=0.6, decay_proportion=0.6))
    assert rates[500] == pytest.approx(500 / 600)
    assert max(rates) == rates[500]


def test_wsd_falls_by_the_root_of_the_part_of_its_decay_that_is_over():
    schedule = ScheduleConfig(type="wsd", warmup_steps=100, decay_proportion=0.4, decay="1-sqrt")
    rates = curve(schedule, steps=[50, 100, T - 400, T - 300, T - 100, T - 4, T])
    assert rates == pytest.approx([0.5, 1, 1, 0.5, 1 - math.sqrt(0.75), 1 - math.sqrt(0.99), 0])


@pytest.mark.parametrize("kind", [kind for kind in ALL_TYPES if kind != "constant"])
def test_min_lr_is_what_the_rate_falls_to_from_the_same_peak_behind_the_same_warmup(kind):
    warmed = {"type": kind, "warmup_steps": 100, "decay_rate": 0.5, "decay_steps": 10}
    to_zero = curve(ScheduleConfig(**warmed), base_lr=2.0)
    rates = curve(ScheduleConfig(**warmed, min_lr=0.5), base_lr=2.0)
    assert rates[:100] == to_zero[:100]
    assert rates[100:] == pytest.approx([0.5 + 0.75 * rate for rate in to_zero[100:]], rel=1e-12)
    assert rates[T] == pytest.approx(0.5)
    assert min(rates[100:]) >= 0.5


def test_warmup_length_prefers_steps_and_defaults_to_none():
    assert warmup_length(ScheduleConfig(warmup_steps=7), T) == 7
    assert warmup_length(ScheduleConfig(warmup_proportion=0.0005), T) == 0.5
    assert warmup_length(ScheduleConfig(), T) == 0
