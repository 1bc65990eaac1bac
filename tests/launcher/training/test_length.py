"""Where a run ends: by steps, epochs, tokens, and by its time."""

import dataclasses
import os
import signal
from types import SimpleNamespace

import pytest
from helpers.runs import losses, metrics, write_config
from helpers.whole_runs import start

from xformer_train.launcher.checkpoint import saving, store
from xformer_train.launcher.config.phases import Phases
from xformer_train.launcher.config.schema import RunConfig, TrainingConfig
from xformer_train.launcher.training import length, loop, step_record
from xformer_train.launcher.training.length import RunClock, last_step
from xformer_train.launcher.training.non_finite import NumericsGuard, RollBack
from xformer_train.launcher.training.phases import RunPhases
from xformer_train.launcher.training.start import Progress
from xformer_train.recipes.config import DataConfig

LONGER = [{"from_step": 5, "data": {"max_seq_length": 256}, "training": {"train_batch_size": 5}}]


def end(progress, batch_size, sizes=(100,), *, phases=None, **length):
    """The last step of a run; sizes: samples of the data of each phase."""
    training = TrainingConfig(train_batch_size=batch_size, **length)
    config = RunConfig(training=training, data=DataConfig(max_seq_length=64), phases=phases)
    data = [SimpleNamespace(train=SimpleNamespace(num_samples=size)) for size in sizes]
    return last_step(config, progress, RunPhases(Phases(config, num_replicas=1), data, progress.phase_start))


def test_epochs_are_passes_over_the_samples_and_the_last_step_may_begin_another():
    assert [end(Progress(), batch, num_epochs=2) for batch in (8, 10, 16, 300)] == [25, 20, 13, 1]


@pytest.mark.parametrize(("batch_size", "steps_left"), [(5, 20), (10, 10), (20, 5), (30, 4)])
def test_a_run_that_goes_on_with_another_batch_makes_as_many_epochs(batch_size, steps_left):
    half = Progress(step=10, samples=100, position=100)
    assert end(half, batch_size, num_epochs=2) == 10 + steps_left


def test_a_run_that_has_made_its_epochs_has_no_step_left():
    assert end(Progress(step=13, samples=208, position=208), 16, num_epochs=2) == 13
    assert end(Progress(step=13, samples=208, position=208), 1, num_epochs=2) == 13


def test_max_tokens_ends_with_the_first_step_that_reaches_it():
    lengths = (1, 512, 513, 1024, 100_000)
    assert [end(Progress(), 8, max_tokens=length) for length in lengths] == [1, 1, 2, 2, 196]
    half = Progress(step=10, samples=80, position=80, tokens=5120)
    assert [end(half, batch, max_tokens=10_240) for batch in (4, 8, 16, 30)] == [30, 20, 15, 13]
    assert end(half, 8, max_tokens=5120) == end(half, 8, max_tokens=1) == 10
    later = dataclasses.replace(half, phase_start=5, phase_start_samples=40, phase_start_tokens=2560)
    assert end(later, 8, max_tokens=5120) == 15


def test_a_second_phase_counts_from_its_start():
    second = Progress(step=30, samples=300, position=50, phase_start=25, phase_start_samples=250)
    assert end(second, 10, num_epochs=1) == 35
    assert end(second, 10, max_steps=40) == 65


def test_epochs_of_a_run_with_phases_count_each_sample_as_a_share_of_the_data_of_its_phase():
    """Half an epoch in five steps of ten samples of 100, then one and a half of 40 samples in steps of five."""
    assert end(Progress(), 10, (100, 40), phases=LONGER, num_epochs=2) == 5 + 12
    assert end(Progress(step=5, samples=50), 10, (100, 40), phases=LONGER, num_epochs=2) == 5 + 12
    assert end(Progress(step=8, samples=65), 10, (100, 40), phases=LONGER, num_epochs=2) == 5 + 12
    assert end(Progress(step=8, samples=65), 10, (100, 40), phases=LONGER, num_epochs=1) == 5 + 4


@pytest.fixture
def seconds(monkeypatch):
    """A clock for runs, on which a step takes one second and an evaluation three, and nothing else takes time."""
    clock = SimpleNamespace(now=100.0, steps=0, at_step={})

    def taking(function, duration_s):
        def taken(*arguments, **options):
            result = function(*arguments, **options)
            clock.now += duration_s
            if duration_s == 1:
                clock.steps += 1
                clock.at_step.get(clock.steps, lambda: None)()
            return result

        return taken

    fake = SimpleNamespace(monotonic=lambda: clock.now, perf_counter=lambda: clock.now)
    for module in (length, loop, step_record, saving):
        monkeypatch.setattr(module, "time", fake)
    monkeypatch.setattr(loop, "train_step", taking(loop.train_step, 1))
    monkeypatch.setattr(loop, "evaluate", taking(loop.evaluate, 3))
    return clock


def hours(seconds):
    return f"training.max_hours={seconds / 3600!r}"


def timed_config(folder, **changes):
    schedule = {"type": "linear", "warmup_proportion": 0.25, "min_lr": 1e-5}
    changes |= {"training__max_steps": None, "checkpoint__asynchronous": False}
    return write_config(folder, schedule=schedule, **changes)


def newest_state(run):
    return store.read_state(store.resolve(run, "latest"))


def rates(run):
    return [row["lr"] for row in metrics(run) if "loss" in row]


def test_a_run_by_time_is_the_run_of_as_many_steps_as_fit(seconds, tmp_path, capsys):
    path = timed_config(tmp_path)
    start(path, "name=timed", hours(20.5))
    start(path, "name=counted", "training.max_steps=20")
    timed, counted = tmp_path / "runs" / "timed", tmp_path / "runs" / "counted"
    assert len(losses(timed)) == 20
    assert rates(timed) == pytest.approx(rates(counted), abs=4e-5)
    assert rates(timed)[0] == 0 and rates(timed)[-1] == pytest.approx(1e-5 + 9.9e-4 * (1 - 19 / 20.5) / 0.75)
    assert newest_state(timed)["elapsed_s"] == 20.5
    assert newest_state(counted)["elapsed_s"] == 20
    start(path, "name=timed", hours(20.5), resume=True)
    out = " ".join(capsys.readouterr().out.split())
    assert "as many as training.max_hours 0.00569444 has time for, of up to 256 tokens a step" in out
    assert "nothing to do: the time of the run is over at step 20; raise training.max_hours to go on" in out


@pytest.mark.parametrize(("every", "steps"), [(4, 15), (1000, 26)])
def test_the_last_evaluation_is_within_the_time(every, steps, seconds, tmp_path):
    """Judged by those before it, of three seconds each; without them by its six micro-batches, as half of three steps."""
    path = timed_config(tmp_path, data__validation_fraction=0.2)
    begun = seconds.now
    start(path, hours(27.8), f"eval.every_steps={every}", "eval.batches=6")
    assert seconds.steps == steps
    assert seconds.now - begun == {4: 27, 1000: 29}[every]


def test_a_run_that_was_stopped_goes_on_with_the_rest_of_its_time(seconds, tmp_path):
    path = timed_config(tmp_path)
    seconds.at_step[7] = lambda: os.kill(os.getpid(), signal.SIGINT)
    start(path, hours(20.5))
    assert newest_state(tmp_path / "runs" / "run")["elapsed_s"] == 7
    seconds.now += 1000
    start(path, hours(20.5), resume=True)
    run = tmp_path / "runs" / "run"
    assert list(losses(run)) == list(range(1, 21))
    assert rates(run)[7] == pytest.approx(1e-5 + 9.9e-4 * (1 - 7 / 20.5) / 0.75)


def test_time_does_not_go_back_with_training(seconds, tmp_path, monkeypatch):
    path = timed_config(tmp_path, reliability__nan="rollback", checkpoint__save_every_steps=5)
    check = NumericsGuard.check_step

    def once_wrong(guard, engine, step, samples, diagnose):
        check(guard, engine, step, samples, diagnose)
        if seconds.steps == 8:
            raise RollBack("for this test")

    monkeypatch.setattr(NumericsGuard, "check_step", once_wrong)
    start(path, hours(20.5))
    assert seconds.steps == 20
    assert max(losses(tmp_path / "runs" / "run")) == 17


def test_hours_count_from_the_start_of_a_phase(seconds, tmp_path):
    path = timed_config(tmp_path)
    start(path, "name=first", "training.max_steps=6")
    second = [f"load.path={tmp_path / 'runs' / 'first'}", "load.rewarmup=true"]
    start(path, "name=second", *second, hours(5.5))
    assert list(losses(tmp_path / "runs" / "second")) == [7, 8, 9, 10, 11]
    assert rates(tmp_path / "runs" / "second")[0] == 0
    state = newest_state(tmp_path / "runs" / "second")
    assert (state["elapsed_s"], state["phase_start_s"]) == (11.5, 6)


def test_of_several_processes_the_slowest_one_counts(seconds):
    """Each tells its own share; a clock takes what all agreed on."""
    clock = RunClock(Progress(), 100 / 3600)
    told = []

    def agreed_with(*numbers):
        told.append(numbers)
        return False, [0.5, 1.01]

    seconds.now += 10
    stop = SimpleNamespace(agreed_with=agreed_with)
    assert not clock.has_time(stop, 2.0, 20.0, evaluates=False, saves=False)
    assert told == [(10 / 80, 12 / 80)] and clock.share == 0.5
    assert clock.elapsed_s() == 100


def test_a_time_shorter_than_a_step_is_a_run_of_one_step(seconds, tmp_path):
    start(timed_config(tmp_path), hours(0.001))
    assert list(losses(tmp_path / "runs" / "run")) == [1]
