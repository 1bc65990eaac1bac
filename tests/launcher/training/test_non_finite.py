"""What follows from steps that were left out and from losses that jump."""

import json
import math
from types import SimpleNamespace

import pytest
from helpers.runs import losses, metrics, write_config

from xformer_train.launcher.config.loading import load_config
from xformer_train.launcher.config.schema import ReliabilityConfig
from xformer_train.launcher.training.non_finite import NotFiniteError, NumericsGuard, RollBack
from xformer_train.launcher.training.train import run


def engine(*, skipped=True, scale=None):
    """What the guard asks of an engine, after a step."""
    optimizer = SimpleNamespace(overflow=skipped, loss_scale=scale)
    return SimpleNamespace(optimizer=optimizer, fp16_enabled=lambda: scale is not None)


def guard(before=None, **settings):
    """before: a guard of a start before this one, whose state was in a checkpoint."""
    state = {} if before is None else json.loads(json.dumps(before.state()))
    return NumericsGuard(ReliabilityConfig(**settings), state, is_main=True)


def check(guarded, **facts):
    guarded.check_step(engine(**facts), 7, range(48, 56), lambda: "layers.3 is to blame")


def test_a_stop_says_where_and_a_good_step_nothing():
    guarded = guard()
    check(guarded, skipped=False)
    with pytest.raises(
        NotFiniteError, match=r"step 7 \(samples 48 to 55\): .* not finite: layers.3 is to blame; the last check"
    ):
        check(guarded)


def test_only_so_many_steps_are_skipped_in_a_row(capsys):
    guarded = guard(nan="skip", nan_limit=2)
    check(guarded)
    check(guarded)
    check(guarded, skipped=False)
    check(guarded)
    check(guarded)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4 and all("the step is skipped" in text for text in said)
    with pytest.raises(NotFiniteError, match=r"after 2 skipped steps in a row \(reliability.nan_limit\): layers.3"):
        check(guarded)


def test_a_run_goes_back_only_so_often():
    guarded = guard(nan="rollback", nan_limit=1)
    with pytest.raises(RollBack, match="step 7"):
        check(guarded)
    check(guarded, skipped=False)
    with pytest.raises(NotFiniteError, match=r"after 1 rollbacks \(reliability.nan_limit\)"):
        check(guarded)


def test_fp16_may_skip_until_the_scale_has_fallen_to_its_limit():
    guarded = guard(min_loss_scale=4.0)
    for scale in (65536.0, 8.0):
        check(guarded, scale=scale)
    check(guarded, scale=4.0, skipped=False)
    with pytest.raises(
        NotFiniteError, match=r"the fp16 loss scale fell to 4, which reliability\.min_loss_scale 4 forbids"
    ):
        check(guarded, scale=4.0)


def test_a_spike_is_told_once_until_it_is_over(capsys):
    guarded = guard(loss_spike_factor=2.0)
    for step, loss in enumerate([9, 8, 7, 6, 6, 6, 6, 6, 11.9, 12.2, 30, 6, math.nan, 15], start=1):
        guarded.check_loss(step, loss)
    said = capsys.readouterr().err.splitlines()
    assert [text.split(":")[1] for text in said] == [" step 10", " step 14"]
    assert (
        "the loss 12.2 is more than 2 times the median of the last ones, 6 (reliability.loss_spike_factor)" in said[0]
    )


def test_a_spike_is_judged_by_eight_losses_or_more_and_undone_with_rollback():
    guarded = guard(loss_spike_factor=2.0, nan="rollback")
    for step, loss in enumerate([1, 1, 1, 1, 1, 1, 1, 5], start=1):
        guarded.check_loss(step, loss)
    with pytest.raises(RollBack, match="step 9: the loss 5"):
        guarded.check_loss(9, 5.0)


def test_losses_of_other_samples_are_forgotten():
    guarded = guard(loss_spike_factor=2.0, nan="rollback")
    for step in range(1, 9):
        guarded.check_loss(step, 1.0)
    guarded.forget_losses()
    for step in range(9, 17):
        guarded.check_loss(step, 5.0)
    with pytest.raises(RollBack, match="step 17: the loss 11 is more than 2 times the median of the last ones, 5"):
        guarded.check_loss(17, 11.0)


def test_a_guard_goes_on_from_the_state_of_the_one_before(capsys):
    """What a resumed run counts: skipped steps in a row, rollbacks, the losses that a spike is judged by, and a spike told."""
    first = guard(nan="skip", nan_limit=2)
    check(first)
    second = guard(before=first, nan="skip", nan_limit=2)
    check(second)
    with pytest.raises(NotFiniteError, match="after 2 skipped steps in a row"):
        check(guard(before=second, nan="skip", nan_limit=2))

    first = guard(nan="rollback", nan_limit=1)
    with pytest.raises(RollBack):
        check(first)
    with pytest.raises(NotFiniteError, match="after 1 rollbacks"):
        check(guard(before=first, nan="rollback", nan_limit=1))

    capsys.readouterr()
    first = guard(loss_spike_factor=2.0)
    for step in range(1, 9):
        first.check_loss(step, 6.0)
    second = guard(first, loss_spike_factor=2.0)
    second.check_loss(9, 13.0)
    guard(second, loss_spike_factor=2.0).check_loss(10, 13.0)
    said = capsys.readouterr().err.splitlines()
    assert [text.split(":")[1] for text in said] == [" step 9"]


def test_a_learning_rate_that_is_far_too_high_ends_a_run_with_a_place(tmp_path):
    path = write_config(tmp_path, optimizer__lr=1e30, training__gradient_clipping=0.0, checkpoint__save_every_steps=1)
    with pytest.raises(NotFiniteError, match=r"the first output that is not finite is that of \w+") as error:
        run(load_config(path, (), world_size=1), resume=False)
    last = max(losses(tmp_path / "runs" / "run"))
    assert str(error.value).startswith(f"step {last + 1:,} ")
    assert all(row["loss"] is not None for row in metrics(tmp_path / "runs" / "run") if "loss" in row)


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "muon"])
def test_a_resumed_run_goes_back_twice_with_every_optimizer(optimizer, tmp_path, monkeypatch, capsys):
    from xformer_train.launcher.training import loop

    path = write_config(
        tmp_path, reliability__nan="rollback", checkpoint__save_every_steps=2, optimizer__type=optimizer
    )
    run(load_config(path, ("training.max_steps=2", "schedule.total_steps=12"), world_size=1), resume=False)
    jumps = [3, 5]

    def jump_once(guard, step, loss):
        if step in jumps:
            jumps.remove(step)
            raise RollBack("a jump")

    monkeypatch.setattr(loop.NumericsGuard, "check_loss", jump_once)
    run(load_config(path, ("training.max_steps=6", "schedule.total_steps=12"), world_size=1), resume=True)
    said = capsys.readouterr().err
    assert [f"rolled back to step{step:08d}" in said for step in (2, 4)] == [True, True]
    assert sorted(losses(tmp_path / "runs" / "run")) == [1, 2, 3, 4, 5, 6]


def test_a_run_without_a_checkpoint_cannot_go_back(tmp_path, monkeypatch):
    from xformer_train.launcher.training import loop

    monkeypatch.setattr(loop.NumericsGuard, "check_loss", lambda *_: (_ for _ in ()).throw(RollBack("a jump")))
    path = write_config(tmp_path, reliability__nan="rollback", checkpoint__save_every_steps=5)
    with pytest.raises(NotFiniteError, match="a jump, and there is no checkpoint yet to roll back to"):
        run(load_config(path, (), world_size=1), resume=False)


def test_an_error_of_the_save_in_progress_ends_a_run_that_goes_back(tmp_path, monkeypatch):
    """One save goes wrong, by an error that is not the system's; the run goes back while that is not known yet."""
    from xformer_train.launcher.checkpoint import saving as checkpoint_saving
    from xformer_train.launcher.training import loop

    write, errors, jumps = checkpoint_saving.write_file, [ZeroDivisionError()], [5]

    def fail_once(value, path):
        if path.parent.name == ".step00000004.tmp" and errors:
            raise errors.pop()
        return write(value, path)

    def jump_once(guard, step, loss):
        if step in jumps:
            jumps.remove(step)
            raise RollBack("a jump")

    monkeypatch.setattr(checkpoint_saving, "write_file", fail_once)
    monkeypatch.setattr(loop.NumericsGuard, "check_loss", jump_once)
    path = write_config(tmp_path, reliability__nan="rollback", checkpoint__save_every_steps=2, training__max_steps=8)
    with pytest.raises(ZeroDivisionError):
        run(load_config(path, (), world_size=1), resume=False)
