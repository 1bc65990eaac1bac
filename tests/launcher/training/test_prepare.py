"""Where a run begins, and that all machines see its directory."""

import dataclasses
import platform
from types import SimpleNamespace

import pytest

from xformer_train.kernels.errors import UserError
from xformer_train.launcher.config.schema import LoadConfig, RunConfig
from xformer_train.launcher.reporting.run_directory import RunDirectory
from xformer_train.launcher.training.prepare import check_is_shared
from xformer_train.launcher.training.start import Continued, NextPhase, Progress
from xformer_train.recipes.config import DataConfig


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
