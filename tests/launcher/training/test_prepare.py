"""Where a run begins and ends, and that all machines see its directory."""

import platform
from types import SimpleNamespace

import pytest

from xformer_train.launcher.config.batch import BatchPlan
from xformer_train.launcher.reporting.run_directory import RunDirectory
from xformer_train.launcher.training.prepare import check_is_shared, last_step
from xformer_train.launcher.training.start import Progress, starting_progress

DATA = SimpleNamespace(train=SimpleNamespace(num_samples=100))


def end(progress, batch_size, *, num_epochs=None, max_steps=None):
    config = SimpleNamespace(training=SimpleNamespace(num_epochs=num_epochs, max_steps=max_steps))
    return last_step(config, progress, DATA, BatchPlan(batch_size, batch_size, 1, 1))


def test_epochs_are_passes_over_the_samples_and_the_last_step_may_begin_another():
    assert [end(Progress(), batch, num_epochs=2) for batch in (8, 10, 16, 300)] == [25, 20, 13, 1]


@pytest.mark.parametrize(("batch_size", "steps_left"), [(5, 20), (10, 10), (20, 5), (30, 4)])
def test_a_run_that_goes_on_with_another_batch_makes_as_many_epochs(batch_size, steps_left):
    half = Progress(step=10, samples=100, position=100)
    assert end(half, batch_size, num_epochs=2) == 10 + steps_left


def test_a_run_that_has_made_its_epochs_has_no_step_left():
    assert end(Progress(step=13, samples=208, position=208), 16, num_epochs=2) == 13
    assert end(Progress(step=13, samples=208, position=208), 1, num_epochs=2) == 13


def test_a_second_phase_counts_from_its_start():
    second = Progress(step=30, samples=300, position=50, phase_start=25, phase_start_samples=250)
    assert end(second, 10, num_epochs=1) == 35
    assert end(second, 10, max_steps=40) == 65


def test_a_checkpoint_of_an_earlier_version_lacks_what_it_did_not_know():
    state = {"step": 5, "samples": 40, "position": 40, "phase_start": 0, "data_fingerprint": "data"}
    config = SimpleNamespace(load=SimpleNamespace(what="all", rewarmup=False))
    assert starting_progress(config, state, "data", continued=True) == Progress(step=5, samples=40, position=40)


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
