"""Runs that keep a mean of their weights, in one process."""

import json

import pytest
import torch
from helpers.runs import BERT, GPT, losses, metrics, weights, write_config
from helpers.whole_runs import start
from typer.testing import CliRunner

from xformer_train.kernels.errors import UserError
from xformer_train.launcher.checkpoint.loading import weights as checkpoint_weights
from xformer_train.launcher.commands import app as cli
from xformer_train.launcher.config.file import ConfigError
from xformer_train.launcher.config.loading import load_config
from xformer_train.launcher.trained_models.pretrained import from_folder
from xformer_train.launcher.training import loop

DECAY = 0.75
KEPT = f"training.ema_decay={DECAY}"


def checkpoint(folder, name, step):
    return folder / "runs" / name / "checkpoints" / f"step{step:08d}"


def moved(mean, weights):
    """The mean after one more step."""
    return {name: DECAY * mean[name].double() + (1 - DECAY) * weight.double() for name, weight in weights.items()}


def assert_equal(ours, theirs, atol=0.0):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor.double(), theirs[name].double(), rtol=0, atol=atol)


@pytest.mark.parametrize(("base", "optimizer", "precision"), [(BERT, "lamb", "fp32"), (GPT, "adamw", "bf16")])
def test_a_resumed_run_has_the_mean_of_a_straight_one_bit_for_bit(base, optimizer, precision, tmp_path, capsys):
    path = write_config(tmp_path, base, optimizer__type=optimizer, data__validation_fraction=0.2, eval__batches=2)
    sets = (KEPT, f"training.precision={precision}")
    start(path, *sets, "name=straight", "eval.every_steps=2")
    assert "; mean of the weights with decay 0.75, over some 4 steps" in " ".join(capsys.readouterr().out.split())
    start(path, *sets, "name=resumed", "training.max_steps=5")
    start(path, *sets, "name=resumed", resume=True)
    assert "(weights, optimizer, mean of the weights, random state;" in " ".join(capsys.readouterr().out.split())
    ours, theirs = (checkpoint_weights(checkpoint(tmp_path, name, 12), ema=True) for name in ("straight", "resumed"))
    assert_equal(ours, theirs)
    rows = [metrics(tmp_path / "runs" / name)[-1] for name in ("straight", "resumed")]
    assert rows[0] == rows[1]
    assert rows[0]["val_ema"] != rows[0]["val_loss"]


def test_measuring_the_mean_changes_nothing_and_the_best_loss_is_that_of_the_weights(tmp_path, capsys):
    path = write_config(tmp_path, data__validation_fraction=0.2, eval__every_steps=3, eval__batches=2)
    start(path, "name=without")
    capsys.readouterr()
    start(path, "name=with", KEPT, "logging.tensorboard=true")
    out = capsys.readouterr().out
    assert losses(tmp_path / "runs" / "with") == losses(tmp_path / "runs" / "without")
    rows, others = (
        [row for row in metrics(tmp_path / "runs" / name) if "val_loss" in row] for name in ("with", "without")
    )
    assert [{key: value for key, value in row.items() if key != "val_ema"} for row in rows] == others
    best = min(row["val_loss"] for row in rows)
    assert f"best loss {best:.4f}" in out
    assert f"loss {rows[-1]['val_ema']:.4f} at step 12" in out
    assert f"nsp {rows[-1]['val_nsp']:.2f}) | ema {rows[-1]['val_ema']:.3f}" in out
    state = json.loads((checkpoint(tmp_path, "with", 12) / "state.json").read_text())
    assert state["best_loss"] == best
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    boards = EventAccumulator(str(tmp_path / "runs" / "with" / "tb")).Reload()
    points = [(point.step, point.value) for point in boards.Scalars("Validation/ema")]
    assert points == [(row["step"], pytest.approx(row["val_ema"])) for row in rows]


def test_a_mean_that_begins_at_a_resume_starts_as_the_weights_then(tmp_path, capsys):
    path = write_config(tmp_path)
    start(path, "training.max_steps=4")
    start(path, KEPT, "training.max_steps=5", resume=True)
    assert "(weights, optimizer, mean of the weights starting as they are, random state;" in " ".join(
        capsys.readouterr().out.split()
    )
    before, after = (checkpoint_weights(checkpoint(tmp_path, "run", step)) for step in (4, 5))
    assert_equal(checkpoint_weights(checkpoint(tmp_path, "run", 5), ema=True), moved(before, after), atol=1e-7)


def test_a_mean_that_ends_at_a_resume_is_dropped(tmp_path, capsys):
    path = write_config(tmp_path)
    start(path, "name=without")
    start(path, "name=ended", KEPT, "training.max_steps=5")
    start(path, "name=ended", resume=True)
    assert "(weights, optimizer, without its mean of the weights, random state;" in " ".join(
        capsys.readouterr().out.split()
    )
    assert losses(tmp_path / "runs" / "ended") == losses(tmp_path / "runs" / "without")
    with pytest.raises(
        UserError, match=r"holds no mean of the weights, .*; leave --ema out, or train with training.ema_decay"
    ):
        checkpoint_weights(checkpoint(tmp_path, "ended", 12), ema=True)


@pytest.mark.parametrize(("base", "command"), [(BERT, ["fill-mask", "a [MASK]"]), (GPT, ["sample", "--prompt", "ta"])])
def test_commands_take_the_mean_on_demand(base, command, tmp_path):
    start(write_config(tmp_path, base), KEPT, "training.max_steps=3")
    source, run_folder = checkpoint(tmp_path, "run", 3), ["--run", str(tmp_path / "runs" / "run")]
    for name, options in (("mean", ["--ema"]), ("weights", [])):
        done = CliRunner().invoke(cli.app, ["export", *run_folder, "--to", str(tmp_path / name), *options])
        assert done.exit_code == 0, done.output
        assert ("with the mean of the weights" in done.output) == bool(options)
        expected = checkpoint_weights(source, ema=bool(options))
        for key, tensor in from_folder(tmp_path / name).weights.items():  # without the rows that fill the vocabulary up
            assert torch.equal(tensor, expected[key][: len(tensor)]), key
        card = (tmp_path / name / "README.md").read_text()
        assert ("| weights | their exponential mean over the steps, training.ema_decay 0.75 |" in card) == bool(options)
    shown = CliRunner().invoke(cli.app, [*command, *run_folder, "--ema"])
    assert "step00000003, mean of the weights: " in shown.stderr, shown.output
    refused = CliRunner().invoke(cli.app, [*command, "--run", str(tmp_path / "mean"), "--ema"])
    assert refused.exit_code != 0
    assert "is an exported model, which has one set of weights; remove --ema, or export with it" in refused.output


def test_weights_alone_are_those_that_were_trained(tmp_path):
    start(write_config(tmp_path, name="first"), KEPT, "training.max_steps=4")
    source = checkpoint(tmp_path, "first", 4)
    path = write_config(tmp_path, name="second", load__path=str(tmp_path / "runs" / "first"), load__what="weights")
    start(path, KEPT, "training.max_steps=1", "optimizer.lr=1e-30")
    assert_equal(weights(checkpoint(tmp_path, "second", 1)), weights(source))
    assert_equal(checkpoint_weights(checkpoint(tmp_path, "second", 1), ema=True), weights(source), atol=1e-8)


@pytest.mark.parametrize(("nan", "mean_before"), [("skip", 5), ("rollback", 4)])
def test_a_step_that_is_left_out_moves_no_mean_and_a_rollback_goes_back_with_it(
    nan, mean_before, tmp_path, monkeypatch
):
    """The sixth step is broken; checkpoints are those of steps 2, 4 and so on."""
    right, history = loop.train_step, []

    def train_step(engine, *args):
        hook = engine.module.register_forward_hook(
            lambda *call: {name: loss * torch.inf for name, loss in call[2].items()}
        )
        if len(history) != 5:
            hook.remove()
        result = right(engine, *args)
        hook.remove()
        names = {parameter: name for name, parameter in engine.module.named_parameters()}
        state = engine.basic_optimizer.state.items()
        history.append(
            ({names[p]: p.detach().clone() for p, _ in state}, {names[p]: s["ema"].clone() for p, s in state})
        )
        return result

    monkeypatch.setattr(loop, "train_step", train_step)
    path = write_config(tmp_path, reliability__nan=nan, checkpoint__save_every_steps=2)
    start(path, KEPT, "training.max_steps=8")
    (_, good), (_, bad), (weight, next_mean) = history[4:7]
    assert_equal(bad, good)
    assert_equal(next_mean, moved(history[mean_before - 1][1], weight), atol=1e-7)


@pytest.mark.parametrize("value", ["0", "1", "-0.5", ".nan", "1.5", "often"])
def test_a_decay_out_of_its_range_is_refused(value, tmp_path):
    with pytest.raises(ConfigError, match=r"training\.ema_decay: got"):
        load_config(write_config(tmp_path), [f"training.ema_decay={value}"])


def test_a_mean_of_weights_that_leave_memory_is_refused(tmp_path):
    zero = {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/"}}
    path = write_config(tmp_path, deepspeed={"zero_optimization": zero})
    with pytest.raises(ConfigError, match=r"offload_optimizer.device: got 'nvme', .*; set cpu, or ema_decay null"):
        load_config(path, [KEPT])
