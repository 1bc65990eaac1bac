from types import SimpleNamespace

import pytest
import torch

from xformer_train.launcher.processes import threads
from xformer_train.launcher.processes.threads import Threads, divide_cores, numbers, threads_of_run


class FakeCores:
    """A machine whose other programs keep `taken` of its cores busy, and on which a step takes `step_s(threads)` seconds."""

    def __init__(self, cores, step_s=lambda count: 0.5, most=None):
        self.cores, self.step_s, self.count, self.taken = cores, step_s, most or cores, 0
        self.now, self.waited, self.idle = 100.0, 0.0, 0.0

    now_s = property(lambda self: lambda: self.now)
    waited_s = property(lambda self: lambda: self.waited)
    idle_s = property(lambda self: lambda: self.idle)

    def pass_step(self):
        seconds, free = self.step_s(self.count), self.cores - self.taken - self.count
        self.now += seconds
        self.waited += seconds * max(0, -free)
        self.idle += seconds * max(0, free)


@pytest.fixture
def run(monkeypatch):
    """Return what takes steps on a fake machine, and gives the number of threads after each."""

    def take(found, cores, steps, taken=0):
        cores.taken, counts = taken, []
        for _ in range(steps):
            cores.pass_step()
            found.step_taken()
            counts.append(cores.count)
        return counts

    return take


@pytest.fixture
def made(monkeypatch):
    """Return what makes the threads of a fake machine, with the lines that they have said."""

    def make(cores, keeps_bits=lambda count: True):
        said = []
        monkeypatch.setattr(torch, "set_num_threads", lambda count: setattr(cores, "count", count))
        return Threads(numbers(cores.count), keeps_bits, said.append, cores), said

    return make


def test_the_numbers_to_choose_among_are_few_and_fall_from_the_largest():
    assert [numbers(most) for most in (1, 2, 3, 8)] == [[1], [2, 1], [3, 2, 1], [8, 7, 6, 4, 3, 2, 1]]
    assert numbers(24) == [24, 23, 16, 12, 8, 6, 4, 3, 2, 1]


def test_a_thread_without_a_core_is_given_up_and_comes_back_with_the_core(made, run):
    cores = FakeCores(2)
    found, said = made(cores)
    assert run(found, cores, 4) == [2, 2, 2, 2]
    assert run(found, cores, 3, taken=1) == [1, 1, 1]
    assert run(found, cores, 3) == [1, 2, 2]
    assert run(found, cores, 1, taken=1) == [1]
    assert len(said) == 1
    assert "1 of 2 threads" in said[0]


def test_as_many_threads_are_given_up_as_cores_are_missing(made, run):
    cores = FakeCores(16)
    found, _ = made(cores)
    assert run(found, cores, 2, taken=1) == [15, 15]
    assert run(found, cores, 2, taken=5) == [8, 8]
    assert run(found, cores, 2, taken=16) == [1, 1]
    assert run(found, cores, 20)[-1] == 16


def test_numbers_that_change_bits_are_passed_over(made, run):
    cores = FakeCores(8)
    found, _ = made(cores, keeps_bits=lambda count: count in (8, 4))
    assert run(found, cores, 2, taken=1) == [4, 4]
    assert run(found, cores, 2, taken=7) == [4, 4]
    assert run(found, cores, 4)[-1] == 8


def test_where_every_number_changes_bits_none_is_given_up(made, run):
    cores = FakeCores(8)
    found, said = made(cores, keeps_bits=lambda count: count == 8)
    assert set(run(found, cores, 40, taken=3)) == {8}
    assert said == []


def test_each_mistake_makes_the_next_attempt_later(made, run):
    cores = FakeCores(2)
    found, _ = made(cores)
    run(found, cores, 2, taken=1)
    counts = []
    for _ in range(60):  # a core that looks idle until it is used, as one that a container may not use
        counts += run(found, cores, 1, taken=cores.count - 1)
    lengths = [len(part) for part in "".join(map(str, counts)).split("2")[1:-1]]
    assert lengths == sorted(lengths)
    assert lengths[-1] >= 4 * lengths[0]


def test_a_small_step_that_does_not_gain_keeps_the_fewest_threads(made, run):
    cores = FakeCores(8, step_s=lambda count: 0.02 if count < 3 else 0.01)
    found, said = made(cores)
    counts = run(found, cores, 200)
    assert counts[:12] == [8] * 12
    assert set(counts[-100:]) == {3}
    assert said == []


def test_a_small_step_that_gains_goes_on_with_all_threads(made, run):
    cores = FakeCores(2, step_s=lambda count: 0.02 / count)
    found, _ = made(cores)
    counts = run(found, cores, 100)
    assert counts.count(1) == 13
    assert counts[-1] == 2


def test_what_threads_gain_is_tried_again_once_no_other_program_disturbs(made, run):
    cores = FakeCores(2, step_s=lambda count: 0.02)
    found, _ = made(cores)
    run(found, cores, 40, taken=1)
    counts = run(found, cores, 200)
    assert 2 in counts
    assert set(counts[-100:]) == {1}


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_a_number_that_a_person_has_set_stays(name, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: pytest.fail("the number has changed"))
    cpu, model = torch.device("cpu"), torch.nn.Linear(8, 8)
    assert threads_of_run(cpu, model, [16], {}, print).may_change
    found = threads_of_run(cpu, model, [16], {name: "4"}, print)
    assert not found.may_change
    for _ in range(100):
        found.step_taken()
        found.look()
    assert not threads_of_run(torch.device("cuda"), model, [16], {}, print).may_change


@pytest.mark.parametrize(
    ("others", "environment", "expected"),
    [
        ([], {}, None),
        ([("this machine", frozenset(range(8)))], {}, 4),
        ([("another machine", frozenset(range(8)))], {}, None),
        ([("this machine", frozenset(range(8, 16)))], {}, None),
        ([("this machine", frozenset(range(8)))] * 20, {}, 1),
        ([("this machine", frozenset(range(8)))], {"OMP_NUM_THREADS": "6"}, None),
    ],
)
def test_processes_that_may_use_the_same_cores_divide_them(others, environment, expected, monkeypatch):
    chosen = []
    monkeypatch.setattr(threads.platform, "node", lambda: "this machine")
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    divide_cores(SimpleNamespace(gather=lambda own: [own, *others]), environment)
    assert [number for number in chosen if number != 8] == ([] if expected is None else [expected])


def test_the_products_of_all_weights_say_whether_a_number_keeps_the_bits(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    asked = []

    def has_same_bits(shape, dtype, tokens, counts):
        asked.append((shape, tokens, tuple(counts)))
        return 2 not in counts

    monkeypatch.setattr(threads, "_has_same_bits", has_same_bits)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 8))
    found = threads_of_run(torch.device("cpu"), model, [16, 32], {}, print)
    assert asked == [], "nothing is computed before another number is wanted"
    assert found.fewer(1) == 3
    assert asked == [(shape, tokens, (4, 3)) for shape in ((6, 8), (8, 6)) for tokens in (16, 32)]
    assert found.fewer(2) == 1


def test_linux_counts_what_this_process_waits_for_and_what_its_cores_do():
    cores = threads.Cores()
    before = cores.waited_s(), cores.idle_s()
    assert sum(range(10**6)) > 0
    assert 0 <= cores.waited_s() - before[0] < 1e3
    assert 0 <= cores.idle_s() - before[1] < 1e3


def test_the_number_of_threads_changes_no_bit_of_a_norm():
    from xformer_train.kernels.ops.norm.row_norms import layer_norm, norm_gradients

    generator = torch.Generator().manual_seed(0)
    z, dy = torch.randn(2, 515, 130, generator=generator) + 0.5
    weight, bias = torch.rand(2, 130, generator=generator)
    results, before = [], torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            y, mean, rstd = layer_norm(z, weight, bias, 1e-5)
            results.append([y, *norm_gradients(dy, (z, mean, rstd, weight, bias), "layer_norm", False)])
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))
