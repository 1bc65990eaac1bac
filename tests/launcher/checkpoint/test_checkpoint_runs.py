"""Whole runs whose checkpoints are damaged or cannot be written, in one process."""

import shutil

import pytest
import torch
from helpers.checkpoints import flip_byte, list_ids
from helpers.runs import losses, weights, write_config

from xformer_train.launcher.config.loading import load_config
from xformer_train.launcher.processes.topology import quiet

quiet(debug=False)

from xformer_train.launcher.checkpoint import saving as checkpoint_saving  # noqa: E402 - DeepSpeed is quiet only when told before
from xformer_train.launcher.checkpoint import store  # noqa: E402
from xformer_train.launcher.training.train import run  # noqa: E402


def start(path, *sets, resume=False):
    run(load_config(path, list(sets)), resume=resume)


@pytest.fixture
def config(tmp_path):
    """Of a run of six steps that saves every second one."""
    return write_config(
        tmp_path,
        training__max_steps=6,
        schedule__type="constant",
        schedule__total_steps=None,
        checkpoint__save_every_steps=2,
    )


def full_disk(monkeypatch, *steps):
    """Lets saves fail as long as the run is at one of these steps."""
    write = checkpoint_saving.write_file

    def refuse(value, path):
        if any(f"{step:08d}" in path.parent.name for step in steps):
            raise OSError(28, "No space left on device")
        return write(value, path)

    monkeypatch.setattr(checkpoint_saving, "write_file", refuse)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(config, tmp_path, monkeypatch, capsys, asynchronous):
    full_disk(monkeypatch, 4)
    start(config, f"checkpoint.asynchronous={str(asynchronous).lower()}")
    folder = tmp_path / "runs/run/checkpoints"
    assert list_ids(folder) == ["step00000002", "step00000006"]
    assert sorted(losses(folder.parent)) == [1, 2, 3, 4, 5, 6]
    printed = capsys.readouterr()
    assert printed.err.count("warning: checkpoint step00000004 could not be saved") == 1
    assert "No space left on device; free space there or make it writable" in printed.err
    assert "No space left on device" in (folder.parent / "log/rank0.log").read_text()
    assert "run run finished" in printed.out


def test_a_full_disk_at_the_last_save_is_an_error_and_the_run_can_be_resumed(config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        full_disk(patch, 6)
        with pytest.raises(OSError, match=r"step00000006 could not be saved.*No space left on device"):
            start(config)
    folder = tmp_path / "runs/run/checkpoints"
    assert list_ids(folder) == ["step00000002", "step00000004"]
    start(config, resume=True)
    start(config, "name=straight")
    assert losses(tmp_path / "runs/straight") == losses(folder.parent)


def test_resume_goes_back_to_the_newest_whole_checkpoint_and_says_so(config, tmp_path, capsys):
    start(config)
    start(config, "name=straight", "training.max_steps=8")
    folder = tmp_path / "runs/run/checkpoints"
    flip_byte(folder / "step00000006/tokenizer/tokenizer.json")
    flip_byte(folder / "step00000004/state.json")
    capsys.readouterr()
    start(config, "training.max_steps=8", resume=True)
    printed = capsys.readouterr()
    out, err = (" ".join(text.split()) for text in (printed.out, printed.err))
    gone = "renamed to {0}.damaged1, the run goes on from step00000002"
    for name, file in (("step00000006", "tokenizer/tokenizer.json"), ("step00000004", "state.json")):
        assert f"warning: checkpoint {name} is damaged: {file} is not as it was written; {gone.format(name)}" in err
    assert "checkpoints/step00000002 (weights, optimizer, random state;" in out
    assert losses(tmp_path / "runs/straight") == losses(folder.parent)
    last = "step00000008"
    ours, theirs = (weights(tmp_path / "runs" / name / "checkpoints" / last) for name in ("run", "straight"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (folder / "step00000006.damaged1").is_dir()


def test_resume_without_any_whole_checkpoint_is_refused_and_changes_nothing(config, tmp_path):
    start(config)
    folder = tmp_path / "runs/run/checkpoints"
    before = sorted(folder.iterdir())
    for path in folder.glob("step*"):
        flip_byte(path / "rng_replica0.pt")
    with pytest.raises(
        ValueError, match=r"no checkpoint in .* can be loaded: .*rng_replica0.pt is not as it was written"
    ):
        start(config, resume=True)
    assert sorted(folder.iterdir()) == before


def test_a_damaged_checkpoint_that_was_asked_for_is_refused_though_there_are_others(config, tmp_path):
    start(config)
    run_dir = tmp_path / "runs/run"
    flip_byte(run_dir / "checkpoints/step00000006/config.resolved.yaml")
    other = ("name=other", f"load.path={run_dir}")
    with pytest.raises(ValueError, match=r"step00000006 is damaged: config.resolved.yaml is not as it was written"):
        start(config, *other)
    assert not (tmp_path / "runs/other/checkpoints").exists()
    start(config, *other, "load.id=step00000004")


def test_another_precision_is_refused_before_data_are_prepared_and_another_batch_is_told(config, tmp_path, capsys):
    start(config, "training.max_steps=2")
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(ValueError, match="was trained in fp32, this run has bf16; set it so"):
        start(config, "training.precision=bf16", resume=True)
    assert not (tmp_path / "cache").exists()
    start(config, "training.max_steps=3", "training.train_batch_size=4", resume=True)
    assert "schedule continued, 4 sequences per step instead of 8)" in " ".join(capsys.readouterr().out.split())


def test_latest_names_the_checkpoint_that_a_run_goes_on_from(config, tmp_path):
    """It may be gone, or have named one that was damaged; `export` and `sample` ask for it before the next save."""
    start(config, "training.max_steps=4")
    folder = tmp_path / "runs/run/checkpoints"
    flip_byte(folder / "step00000004/rng_replica0.pt")
    start(config, "training.max_steps=2", resume=True)
    assert store.latest_id(folder) == "step00000002"
    (folder / "latest").unlink()
    start(config, "training.max_steps=2", resume=True)
    assert store.latest_id(folder) == "step00000002"
