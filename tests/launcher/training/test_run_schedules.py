"""Whole runs whose schedule is branched off another run's, or tied to their time."""

import shutil

import pytest
import torch
from helpers.runs import losses, metrics, weights, write_config
from helpers.whole_runs import assert_same_run, start

WSD = {"type": "wsd", "warmup_steps": 2, "decay_proportion": 0.5, "min_lr": 1e-5}


def rates(run):
    return {row["step"]: row["lr"] for row in metrics(run) if "loss" in row}


@pytest.mark.parametrize("decay", ["linear", "1-sqrt"])
def test_a_decay_branched_off_where_the_own_one_begins_equals_it_bit_for_bit(decay, tmp_path, capsys):
    path = write_config(tmp_path, schedule=WSD | {"decay": decay}, checkpoint__save_every_steps=2)
    start(path, "name=whole", "checkpoint.keep_last=null")
    capsys.readouterr()
    whole = tmp_path / "runs" / "whole"
    branch = [f"load.path={whole}", "load.id=step00000006", "load.decay=true"]
    start(path, *branch, "name=branch", "training.max_steps=6")
    out = " ".join(capsys.readouterr().out.split())
    assert "wsd: its" in out and "decay to 1e-05 alone, over 6 steps" in out
    assert "data at sample 48, decay branched off step 6 of whole)" in out and "jumps" not in out
    decaying = tmp_path / "runs" / "branch"
    assert losses(decaying) == {step: loss for step, loss in losses(whole).items() if step > 6}
    assert rates(decaying) == {step: lr for step, lr in rates(whole).items() if step > 6}
    ours, theirs = (weights(run / "checkpoints" / "step00000012") for run in (whole, decaying))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    start(path, *branch, "name=stopped", "training.max_steps=4")
    start(path, *branch, "name=stopped", "training.max_steps=6", resume=True)
    assert rates(tmp_path / "runs" / "stopped")[12] == rates(whole)[12]


def test_a_branch_off_a_run_with_phases_says_what_they_had_set_and_goes_on_as_that_with_it(tmp_path, capsys):
    phases = [
        {"from_step": 4, "data": {"max_seq_length": 64}, "training": {"train_batch_size": 4, "micro_batch_size": 2}}
    ]
    path = write_config(tmp_path, phases=phases, schedule=WSD, checkpoint__save_every_steps=2)
    start(path, "name=whole", "checkpoint.keep_last=null")
    branch = [
        f"load.path={tmp_path / 'runs' / 'whole'}",
        "load.id=step00000006",
        "load.decay=true",
        "training.max_steps=6",
    ]
    capsys.readouterr()
    start(path, *branch, "name=other")
    out, err = capsys.readouterr()
    assert (
        "at step 6 the phases of whole had set data.max_seq_length 64, training.train_batch_size 4, unlike this" in err
    )
    assert "step 10/12 | phase 2 of 2, steps 11 to 12:" in out, "counted from the decay, told as steps of the run"
    sections = ("data.max_seq_length=64", "training.train_batch_size=4", "training.micro_batch_size=2")
    start(path, *branch, "name=same", "phases=null", *sections)
    assert "the phases of" not in capsys.readouterr().err
    whole = {step: loss for step, loss in losses(tmp_path / "runs" / "whole").items() if step > 6}
    assert losses(tmp_path / "runs" / "same") == whole


def test_a_branch_that_was_stopped_goes_on_as_if_it_had_not(tmp_path):
    """Off a run that ended long before its own decay."""
    path = write_config(tmp_path, schedule=WSD, training__max_steps=1000)
    start(path, "name=whole", "training.max_steps=8", "schedule.total_steps=1000")
    sets = [f"load.path={tmp_path / 'runs' / 'whole'}", "load.decay=true", "training.max_steps=4"]
    start(path, *sets, "name=straight")
    assert list(rates(tmp_path / "runs" / "straight").values()) == pytest.approx([1e-3, 7.525e-4, 5.05e-4, 2.575e-4])
    start(path, *sets, "name=resumed", "checkpoint.save_every_steps=2")
    shutil.rmtree(tmp_path / "runs" / "resumed" / "checkpoints" / "step00000012")
    start(path, *sets, "name=resumed", resume=True)
    assert_same_run(tmp_path, "straight", "resumed", 12)


def test_a_branch_off_a_warmup_or_a_decay_is_told_with_the_jump(tmp_path, capsys):
    path = write_config(tmp_path, schedule=WSD, checkpoint__save_every_steps=1, checkpoint__keep_last=None)
    start(path, "name=whole")
    for step, jump in ((1, "5.00e-04"), (2, None), (5, None), (8, "6.70e-04")):
        branch = [f"load.path={tmp_path / 'runs' / 'whole'}", f"load.id=step{step:08d}", "load.decay=true"]
        start(path, *branch, f"name=branch{step}", "training.max_steps=1")
        said = (
            f"step {step} is in the warm-up or decay of the schedule of 12 steps that led there, so the learning rate"
        )
        out = " ".join("".join(capsys.readouterr()).split())
        assert (f"{said} jumps from {jump} to 1.00e-03; load.id names a checkpoint" in out) == (jump is not None)
        assert ("jumps" in out) == (jump is not None)
