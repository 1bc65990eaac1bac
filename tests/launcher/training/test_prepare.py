"""Where a run begins and ends, and that all machines see its directory."""

import dataclasses
import platform
from types import SimpleNamespace

import pytest

from xformer_train.kernels.errors import UserError
from xformer_train.launcher.config.phases import Phases
from xformer_train.launcher.config.schema import LoadConfig, RunConfig, TrainingConfig
from xformer_train.launcher.reporting.run_directory import RunDirectory
from xformer_train.launcher.training.length import last_step
from xformer_train.launcher.training.phases import RunPhases
from xformer_train.launcher.training.prepare import check_is_shared
from xformer_train.launcher.training.start import Continued, NextPhase, Progress
from xformer_train.recipes.config import DataConfig


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


LONGER = [{"from_step": 5, "data": {"max_seq_length": 256}, "training": {"train_batch_size": 5}}]


def test_epochs_of_a_run_with_phases_count_each_sample_as_a_share_of_the_data_of_its_phase():
    """Half an epoch in five steps of ten samples of 100, then one and a half of 40 samples in steps of five."""
    assert end(Progress(), 10, (100, 40), phases=LONGER, num_epochs=2) == 5 + 12
    assert end(Progress(step=5, samples=50), 10, (100, 40), phases=LONGER, num_epochs=2) == 5 + 12
    assert end(Progress(step=8, samples=65), 10, (100, 40), phases=LONGER, num_epochs=2) == 5 + 12
    assert end(Progress(step=8, samples=65), 10, (100, 40), phases=LONGER, num_epochs=1) == 5 + 4


def start_from(kind, tmp_path, monkeypatch, *, rewarmup=False, **state):
    """A start from a checkpoint with this state."""
    monkeypatch.setattr("xformer_train.launcher.checkpoint.store.read_state", lambda checkpoint: state)
    alone = SimpleNamespace(rank=0, gather=lambda value: [value], meet=lambda: None)
    config = RunConfig(load=LoadConfig(rewarmup=rewarmup), data=DataConfig(max_seq_length=64))
    return kind(config, alone, tmp_path)


def phases(fingerprint):
    return SimpleNamespace(data_at=lambda step: SimpleNamespace(fingerprint=fingerprint), begun=lambda step: [])


STATE = {
    "step": 5,
    "samples": 40,
    "position": 30,
    "phase_start": 2,
    "phase_start_samples": 16,
    "tokens": 1280,
    "phase_start_tokens": 256,
    "data_fingerprint": "data",
}
SAVED = Progress(
    step=5, samples=40, position=30, phase_start=2, phase_start_samples=16, tokens=1280, phase_start_tokens=256
)


def test_a_checkpoint_of_an_earlier_version_lacks_what_it_did_not_know(tmp_path, monkeypatch):
    state = {"step": 5, "samples": 40, "position": 40, "phase_start": 0, "data_fingerprint": "data"}
    start = start_from(Continued, tmp_path, monkeypatch, **state)
    assert start.progress(phases("data")) == Progress(step=5, samples=40, position=40, tokens=40 * 64)


def test_a_run_goes_on_where_it_stood_and_with_its_own_data_only(tmp_path, monkeypatch):
    start = start_from(Continued, tmp_path, monkeypatch, rewarmup=True, **STATE)
    assert start.progress(phases("data")) == SAVED, "load.rewarmup is for a phase, and that has begun already"
    with pytest.raises(UserError, match=r"run run stopped at step 5 on other data"):
        start.progress(phases("others"))


ANEW = {"phase_start": 5, "phase_start_samples": 40, "phase_start_tokens": 1280}


@pytest.mark.parametrize(
    ("rewarmup", "data", "changed"),
    [
        (False, "data", {}),
        (False, "others", {"position": 0}),
        (True, "data", ANEW),
        (True, "others", {"position": 0, **ANEW}),
    ],
)
def test_another_phase_may_have_other_data_and_begin_the_schedule_anew(rewarmup, data, changed, tmp_path, monkeypatch):
    start = start_from(NextPhase, tmp_path, monkeypatch, rewarmup=rewarmup, **STATE)
    assert start.progress(phases(data)) == dataclasses.replace(SAVED, **changed)


def test_a_machine_that_does_not_see_the_run_directory_says_so_and_the_others_leave(tmp_path):
    shared, missing = RunDirectory(tmp_path / "shared"), RunDirectory(tmp_path / "missing")
    shared.root.mkdir()
    shared.lock.touch()

    def two(rank, of_the_other):
        def gather(value):
            return [value, of_the_other] if rank == 0 else [of_the_other, value]

        return SimpleNamespace(rank=rank, gather=gather, meet=lambda: None)

    check_is_shared(shared, two(0, None))
    with pytest.raises(
        ValueError, match=rf"output folder {missing.root} is not seen by {platform.node()}; .*all machines share"
    ):
        check_is_shared(missing, two(1, None))
    with pytest.raises(SystemExit):
        check_is_shared(shared, two(0, False))
