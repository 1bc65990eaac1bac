"""Runs whose batch, samples and schedule change on the way: exact resume, and what two chained runs do in their place."""

import json
import shutil

import pytest
import torch
from helpers.runs import BERT, GPT, MODERNBERT, PACKED, losses, merged, metrics, weights, write_config
from helpers.whole_runs import start

from xformer_train.kernels.errors import UserError
from xformer_train.launcher.trained_models.export import export
from xformer_train.launcher.training import loop
from xformer_train.launcher.training.non_finite import RollBack

PHASES = [
    {"from_step": 4, "data": {"max_seq_length": 64}, "objective": {"mlm_probability": 0.3}},
    {"from_step": 7, "training": {"train_batch_size": 12, "micro_batch_size": 2}, "data": {"max_seq_length": 24}},
    {"from_share": 0.75, "schedule": {"type": "cosine", "warmup_steps": 1}, "optimizer": {"lr": 0.002}},
]
OF_ALL_KINDS = {
    "bert without padding": merged(BERT, {"layer.unpad": True}),
    "packed bert": PACKED,
    "modernbert": MODERNBERT,
    "gpt": GPT,
}


def stopped_at(folder, step, name):
    """A copy of the unbroken run as it was when it had saved this step."""
    copy = folder / "runs" / name
    shutil.copytree(folder / "runs" / "unbroken", copy)
    for checkpoint in (copy / "checkpoints").glob("step*"):
        if int(checkpoint.name.removeprefix("step")) > step:
            shutil.rmtree(checkpoint)
    (copy / "checkpoints" / "latest").write_text(f"step{step:08d}\n")
    return copy


def with_phases(folder, base=BERT, **changes):
    first = {key: value for key, value in PHASES[0].items() if key != "objective" or base is not GPT}
    settings = {
        "phases": [first, *PHASES[1:]],
        "name": "unbroken",
        "schedule__total_steps": None,
        "data__validation_fraction": 0.2,
        "eval__every_steps": 3,
        "checkpoint__save_every_steps": 1,
        "checkpoint__keep_last": None,
    }
    return write_config(folder, base, **{**settings, **changes})


def assert_resumes_exactly(folder, base, steps):
    path = with_phases(folder, base)
    start(path)
    unbroken = folder / "runs" / "unbroken"
    for step in steps:
        name = f"from{step}"
        copy = stopped_at(folder, step, name)
        start(path, f"name={name}", resume=True)
        kept = ("step", "loss", "val_loss", "lr", "samples", "epoch", "grad_norm")
        assert [{key: row.get(key) for key in kept} for row in metrics(copy)] == [
            {key: row.get(key) for key in kept} for row in metrics(unbroken)
        ]
        ours, theirs = (weights(run_dir / "checkpoints" / "step00000012") for run_dir in (copy, unbroken))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_run_resumed_inside_its_phases_and_on_both_sides_of_borders_equals_an_unbroken_one_bit_for_bit(tmp_path):
    assert_resumes_exactly(tmp_path, BERT, (3, 4, 5, 7, 9))


@pytest.mark.parametrize("base", OF_ALL_KINDS.values(), ids=OF_ALL_KINDS)
def test_any_kind_of_samples_resumes_exactly_at_and_after_a_border(base, tmp_path):
    assert_resumes_exactly(tmp_path, base, (4, 8))


TWICE = [{"from_step": 5, "training": {"train_batch_size": 12}, "optimizer": {"lr": 0.002}}]


def test_a_run_with_another_batch_and_lr_in_its_second_phase_equals_two_chained_runs(tmp_path):
    """The samples are the same, so both go on at the same position; dropout goes on too."""
    path = write_config(tmp_path, name="one", phases=TWICE, schedule__total_steps=None)
    start(path)
    start(path, "name=first", "phases=null", "training.max_steps=5")
    chained = (f"load.path={tmp_path}/runs/first", "load.rewarmup=true", "training.max_steps=7")
    start(path, "name=second", "phases=null", *chained, "training.train_batch_size=12", "optimizer.lr=0.002")
    one, first, second = (losses(tmp_path / "runs" / name) for name in ("one", "first", "second"))
    assert one == first | second
    ours, theirs = (weights(tmp_path / "runs" / name / "checkpoints" / "step00000012") for name in ("one", "second"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_rollback_over_a_border_goes_on_behind_the_samples_seen_with_the_batch_of_each_step(
    tmp_path, monkeypatch, capsys
):
    jumps, seen = [6], []
    check_step = loop.NumericsGuard.check_step

    def note(guard, engine, step, samples, diagnose):
        seen.append((step, samples.start, samples.stop))
        check_step(guard, engine, step, samples, diagnose)

    def jump_once(guard, step, loss):
        if step in jumps:
            jumps.remove(step)
            raise RollBack("a jump")

    monkeypatch.setattr(loop.NumericsGuard, "check_step", note)
    monkeypatch.setattr(loop.NumericsGuard, "check_loss", jump_once)
    path = write_config(
        tmp_path, phases=TWICE, reliability__nan="rollback", checkpoint__save_every_steps=4, training__max_steps=7
    )
    start(path, "schedule.total_steps=null")
    before = [(1, 0, 8), (2, 8, 16), (3, 16, 24), (4, 24, 32), (5, 32, 40), (6, 40, 52)]
    assert seen == [*before, (5, 52, 60), (6, 60, 72), (7, 72, 84)]
    assert [row["samples"] for row in metrics(tmp_path / "runs" / "run")] == [8, 16, 24, 32, 40, 52, 64]
    assert capsys.readouterr().out.count("step 5/7 | phase 2 of 2, steps 6 to 7: 12 sequences") == 2


def test_phases_that_have_begun_stay_as_they_were_and_later_ones_may_change(tmp_path):
    path = write_config(
        tmp_path, phases=TWICE, schedule__total_steps=None, training__max_steps=7, checkpoint__save_every_steps=4
    )
    start(path)
    now = r"run run has taken 7 steps with the phases from_step 5 \{.*\}, not "
    remedy = "; put the phases that have begun back as they were: only later ones may change"
    stays = "; from_step in place of from_share stays where it is when training.max_steps changes"
    for change, text in (
        ("phases=null", f"without phases{remedy}$"),
        ("phases.0.from_step=4", "with the phases from_step 4 "),
        ("phases.0.optimizer.lr=0.003", r"with the phases from_step 5 .*\"lr\": 0.003"),
        ("phases=[{from_share: 0.7, optimizer: {lr: 1}}]", f"with the phases from_step 6 .*{remedy}{stays}"),
    ):
        with pytest.raises(UserError, match=now + text):
            start(path, "training.max_steps=9", change, resume=True)
    start(path, "training.max_steps=8", "phases.0.training.micro_batch_size=3", resume=True)
    later = [*TWICE, {"from_share": 0.8, "data": {"max_seq_length": 16}}]
    start(write_config(tmp_path, phases=later, schedule__total_steps=None), "training.max_steps=10", resume=True)
    assert [row["samples"] for row in metrics(tmp_path / "runs" / "run")][-3:] == [76, 88, 100]


def test_validation_is_that_of_the_phase_and_losses_are_judged_anew_with_other_samples(tmp_path, capsys):
    """Where nothing is learnt, the loss of the second phase is that of a run on its samples with the same weights."""
    still = ["optimizer.lr=1e-30", "schedule.total_steps=null", "data.validation_fraction=0.2"]
    path = write_config(tmp_path, phases=[{"from_step": 2, "data": {"max_seq_length": 64}}], training__max_steps=4)
    start(path, "eval.every_steps=2", "reliability.loss_spike_factor=100", *still)
    first, second = (row["val_loss"] for row in metrics(tmp_path / "runs" / "run") if "val_loss" in row)
    assert f"best loss {second:.4f} at step 4" in capsys.readouterr().out
    state = json.loads((tmp_path / "runs" / "run" / "checkpoints" / "step00000004" / "state.json").read_text())
    assert len(state["guard"]["losses"]) == 2, "those of the second phase"
    for name, length, expected in (("short", 32, first), ("long", 64, second)):
        alone = (f"name={name}", "phases=null", f"data.max_seq_length={length}", "training.max_steps=2", *still)
        start(path, *alone, f"load.path={tmp_path}/runs/run", "load.what=weights")
        assert metrics(tmp_path / "runs" / name)[-1]["val_loss"] == expected


def test_a_growing_batch_takes_each_sample_once_and_resumes_exactly(tmp_path, monkeypatch):
    growing = {"training__batch_warmup_from": 4, "training__batch_warmup_steps": 6, "training__train_batch_size": 16}
    path = write_config(
        tmp_path,
        name="unbroken",
        logging__every_steps=5,
        checkpoint__save_every_steps=1,
        checkpoint__keep_last=None,
        **growing,
    )
    start(path)
    sizes = [4, 4, 8, 8, 12, 12, *[16] * 6]
    rows = metrics(tmp_path / "runs" / "unbroken")
    assert [(row["step"], row["samples"]) for row in rows] == [(5, 36), (10, 112), (12, 144)]
    spent = [row["step_time_s"] * steps for row, steps in zip(rows, (5, 5, 2), strict=True)]
    shown = [row["seq_per_s"] * time_s for row, time_s in zip(rows, spent, strict=True)]
    assert shown == pytest.approx([sum(sizes[:5]), sum(sizes[5:10]), sum(sizes[10:])], rel=1e-4)
    padded = [row["padded_tokens_per_s"] * time_s for row, time_s in zip(rows, spent, strict=True)]
    assert padded == pytest.approx([32 * 36, 32 * 76, 32 * 32], rel=1e-4)
    copy = stopped_at(tmp_path, 3, "cut")
    start(path, "name=cut", resume=True)
    ours, theirs = (weights(run / "checkpoints" / "step00000012") for run in (copy, tmp_path / "runs" / "unbroken"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_row_of_metrics_never_mixes_two_phases(tmp_path):
    path = write_config(tmp_path, phases=[{"from_step": 4, "data": {"max_seq_length": 64}}], schedule__total_steps=None)
    start(path, "logging.every_steps=10")
    rows = metrics(tmp_path / "runs" / "run")
    assert [row["step"] for row in rows] == [4, 10, 12]
    lengths = [row["padded_tokens_per_s"] / row["seq_per_s"] for row in rows]
    assert lengths == pytest.approx([32, 64, 64], rel=1e-4)


def test_a_length_in_tokens_or_epochs_counts_each_phase_by_its_own_samples(tmp_path, capsys):
    phases = [{"from_step": 3, "data": {"max_seq_length": 64}, "training": {"train_batch_size": 4}}]
    path = write_config(tmp_path, phases=phases, schedule__total_steps=None)
    path.write_text(path.read_text().replace("max_steps: 12", f"max_tokens: {3 * 8 * 32 + 4 * 4 * 64 + 1}"))
    start(path, "checkpoint.save_every_steps=2")
    assert sorted(losses(tmp_path / "runs" / "run")) == list(range(1, 9))
    start(path, resume=True)
    assert "nothing to do: step 8 is reached" in capsys.readouterr().out
    path.write_text(path.read_text().replace("from_step: 3", "from_step: 30"))
    with pytest.raises(
        UserError, match=r"phases.0.from_step=30 must be before the run ends, at step \d+; let the run be longer"
    ):
        start(path, "name=other")


def test_an_export_takes_texts_as_long_as_the_phases_that_its_checkpoint_has_seen(tmp_path):
    phases = [{"from_step": 2, "data": {"max_seq_length": 64}}, {"from_step": 4, "data": {"max_seq_length": 16}}]
    path = write_config(
        tmp_path,
        phases=phases,
        training__max_steps=5,
        schedule__total_steps=None,
        checkpoint__save_every_steps=1,
        checkpoint__keep_last=None,
    )
    start(path)
    for step, length in ((2, 32), (3, 64), (5, 64)):
        folder = tmp_path / f"export{step}"
        export(tmp_path / "runs" / "run" / "checkpoints" / f"step{step:08d}", folder, force=False)
        assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == length
        assert f"trained on up to {length} |" in (folder / "README.md").read_text()
    card = (folder / "README.md").read_text()
    assert '| from step 2 | `{"data": {"max_seq_length": 64}}` |' in card
