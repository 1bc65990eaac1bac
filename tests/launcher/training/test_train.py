"""Whole runs in one process: exact resume, phases, evaluation, and what errors in them say."""

import sys

import pytest
import torch
from helpers.checkpoints import changed_state
from helpers.runs import BERT, GPT, LLAMA, MODERNBERT, PACKED, losses, merged, metrics, weights, write_config
from helpers.whole_runs import assert_same_run, start

from xformer_train.kernels.errors import UserError
from xformer_train.launcher.commands import app as cli
from xformer_train.launcher.config.loading import load_config
from xformer_train.launcher.training import loop
from xformer_train.recipes import RECIPES
from xformer_train.recipes.data.stream import prepare_data
from xformer_train.recipes.data.tokenizer import load_tokenizer


def samples_of(path):
    config = load_config(path).config
    tokenizer = load_tokenizer(f"{config.output_dir}/{config.name}/tokenizer")
    recipe = RECIPES[config.model.type]
    data = prepare_data(recipe, tokenizer, config.data, config.objective, config.seed, lambda _: None)
    return data.train.num_samples


UNPADDED = {"layer.unpad": True}
KINDS = {
    "bert": BERT,
    "bert without padding": merged(BERT, UNPADDED),
    "packed bert": PACKED,
    "gpt": GPT,
    "modernbert without padding": merged(MODERNBERT, UNPADDED),
    "llama": LLAMA,
}


@pytest.mark.parametrize("base", KINDS.values(), ids=KINDS)
def test_a_resumed_run_equals_a_straight_one_bit_for_bit(base, tmp_path, capsys):
    """With dropout and accumulation, stopped within an epoch."""
    path = write_config(tmp_path, base)
    start(path, "name=straight")
    start(path, "name=resumed", "training.max_steps=5")
    start(path, "name=resumed", resume=True)
    assert_same_run(tmp_path, "straight", "resumed", 12)
    out = " ".join(capsys.readouterr().out.split())
    assert "checkpoints/step00000005 (weights, optimizer, random state; data at sample 40, schedule continued)" in out
    assert "changed since the last start of this run: training.max_steps: 5 -> 12" in out


@pytest.mark.parametrize("optimizer", ["lamb", "adamw"])
def test_a_run_resumed_at_and_after_an_epoch_border_equals_a_straight_one(optimizer, tmp_path):
    path = write_config(tmp_path, GPT, optimizer__type=optimizer, checkpoint__keep_last=None)
    start(path, "name=probe", "training.max_steps=1")
    size = samples_of(write_config(tmp_path, GPT, name="probe"))
    batch = next(size // n for n in range(2, size) if size % n == 0 and size // n <= 16)
    steps = size // batch
    sets = [f"training.train_batch_size={batch}", "training.micro_batch_size=null", f"schedule.total_steps={2 * steps}"]
    start(path, *sets, "name=straight", f"training.max_steps={steps + 2}")
    start(path, *sets, "name=resumed", f"training.max_steps={steps}")
    assert metrics(tmp_path / "runs" / "resumed")[-1]["epoch"] == 1
    start(path, *sets, "name=resumed", f"training.max_steps={steps + 1}", resume=True)
    start(path, *sets, "name=resumed", f"training.max_steps={steps + 2}", resume=True)
    assert_same_run(tmp_path, "straight", "resumed", steps + 2)


def test_a_second_phase_with_longer_sequences_resumes_exactly_and_restarts_the_schedule(tmp_path, capsys):
    start(write_config(tmp_path, name="phase1"), "training.max_steps=4")
    second = {
        "data__max_seq_length": 64,
        "load__path": str(tmp_path / "runs" / "phase1"),
        "load__rewarmup": True,
        "training__max_steps": 6,
        "schedule__total_steps": 6,
    }
    path = write_config(tmp_path, name="phase2", **second)
    start(path, "name=straight")
    assert "new data, schedule restarted" in capsys.readouterr().out
    start(path, "name=resumed", "training.max_steps=3")
    start(path, "name=resumed", resume=True)
    assert_same_run(tmp_path, "straight", "resumed", 10)
    rows = metrics(tmp_path / "runs" / "straight")
    assert [row["step"] for row in rows] == [5, 6, 7, 8, 9, 10]
    assert rows[0]["lr"] == 0
    assert rows[0]["samples"] == 40


def test_weights_alone_start_a_new_run(tmp_path):
    start(write_config(tmp_path, name="first"), "training.max_steps=4")
    path = write_config(tmp_path, name="second", load__path=str(tmp_path / "runs" / "first"), load__what="weights")
    start(path, "training.max_steps=1", "optimizer.lr=1e-30")
    before = weights(tmp_path / "runs" / "first" / "checkpoints" / "step00000004")
    after = weights(tmp_path / "runs" / "second" / "checkpoints" / "step00000001")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_evaluation_changes_nothing_and_is_repeatable(tmp_path):
    path = write_config(tmp_path, data__validation_fraction=0.2)
    start(path, "name=often", "eval.every_steps=2")
    start(path, "name=once")
    assert losses(tmp_path / "runs" / "often") == losses(tmp_path / "runs" / "once")
    held_out = {name: metrics(tmp_path / "runs" / name)[-1] for name in ("often", "once")}
    assert held_out["often"] == held_out["once"]
    assert {"step", "val_loss", "val_mlm", "val_nsp"} <= held_out["once"].keys()


def best_in(capsys):
    """What the closing summary says of the validation losses."""
    return [line.strip() for line in capsys.readouterr().out.splitlines() if "best" in line]


def test_a_resumed_run_remembers_its_best_validation_loss(tmp_path, capsys):
    path = write_config(tmp_path, data__validation_fraction=0.2, eval__every_steps=2)
    start(path, "training.max_steps=6")
    (best,) = best_in(capsys)
    start(path, "training.max_steps=8", "optimizer.lr=10", "training.gradient_clipping=0", resume=True)
    rows = [row for row in metrics(tmp_path / "runs" / "run") if "val_loss" in row]
    assert min(rows, key=lambda row: row["val_loss"])["step"] == 6
    assert best_in(capsys) == [best]
    # Another run that starts there has none yet.
    where = (f"load.path={tmp_path}/runs/run", "load.id=step00000006")
    start(path, "name=other", "training.max_steps=8", "optimizer.lr=10", "training.gradient_clipping=0", *where)
    (other,) = best_in(capsys)
    assert other != best and "8" in other


def test_a_resumed_run_goes_on_counting_where_it_stopped(tmp_path, monkeypatch):
    path = write_config(tmp_path, reliability__loss_spike_factor=100.0)
    start(path, "training.max_steps=3")
    given = []

    class Guard(loop.NumericsGuard):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            given.append(self.state())

    monkeypatch.setattr(loop, "NumericsGuard", Guard)
    start(path, "training.max_steps=4", resume=True)
    assert given[0]["losses"] == [losses(tmp_path / "runs/run")[step] for step in (1, 2, 3)]


def test_a_checkpoint_from_before_these_fields_goes_on(tmp_path):
    path = write_config(tmp_path)
    start(path, "training.max_steps=3")
    checkpoint = tmp_path / "runs/run/checkpoints/step00000003"
    with changed_state(checkpoint) as state:
        for name in ("best_loss", "best_step", "guard"):
            del state[name]
    start(path, "name=straight")
    start(path, resume=True)
    assert_same_run(tmp_path, "straight", "run", 12)


@pytest.mark.parametrize("base", [merged(BERT, {"model.pre_layer_norm": False}), MODERNBERT], ids=["post-LN", "modern"])
def test_leaving_padding_out_does_not_change_a_run(base, tmp_path, capsys):
    """Classic pre-LN in the resumed run above."""
    path = write_config(
        tmp_path,
        base,
        model__hidden_dropout_prob=0.0,
        data__validation_fraction=0.2,
        data__short_seq_prob=0.9,
        optimizer__lr=0.01,
    )
    short = ["training.max_steps=6", "eval.batches=2"]
    start(path, "name=padded", *short)
    assert "no padding" not in capsys.readouterr().out
    start(path, "name=unpadded", *short, "layer.unpad=true")
    assert "no padding outside attention" in capsys.readouterr().out
    padded, unpadded = losses(tmp_path / "runs" / "padded"), losses(tmp_path / "runs" / "unpadded")
    # fp32 sums in another order, fed back through 6 Adam steps; attention drops the same probabilities in both
    assert list(padded.values()) == pytest.approx(list(unpadded.values()), rel=2e-5)
    last = [metrics(tmp_path / "runs" / name)[-1]["val_loss"] for name in ("padded", "unpadded")]
    assert last[0] == pytest.approx(last[1], rel=2e-5)


def test_accumulation_does_not_change_the_loss(tmp_path):
    """Masked tokens differ in number from one micro-batch to the next, yet every token weighs the same."""
    path = write_config(
        tmp_path, model__hidden_dropout_prob=0.0, model__attention_probs_dropout_prob=0.0, optimizer__lr=0.01
    )
    start(path, "name=whole", "training.micro_batch_size=8")
    start(path, "name=parts", "training.micro_batch_size=2")
    whole, parts = losses(tmp_path / "runs" / "whole"), losses(tmp_path / "runs" / "parts")
    # fp32 sums in another order, fed back through 12 Adam steps
    assert list(whole.values()) == pytest.approx(list(parts.values()), rel=2e-5)


@pytest.mark.parametrize("kind", ["bert without padding", "gpt", "modernbert without padding", "llama"])
def test_activation_checkpointing_changes_no_bit_of_a_run(kind, tmp_path):
    """With dropout and accumulation."""
    path = write_config(tmp_path, KINDS[kind], training__max_steps=3)
    start(path, "name=none")
    for choice in ("selective", "full"):
        start(path, f"name={choice}", f"training.activation_checkpointing={choice}")
        assert_same_run(tmp_path, "none", choice, 3)


def test_a_fault_deep_in_the_loop_shows_its_traceback_once_on_the_console_and_once_in_the_log(
    tmp_path, monkeypatch, capsys
):
    def broken(*args):
        raise ValueError("a defect")

    monkeypatch.setattr(loop, "mean_losses", broken)
    monkeypatch.setattr(sys, "argv", ["xformer-train", "--config", str(write_config(tmp_path))])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 1
    text = capsys.readouterr().err
    assert text.count("ValueError: a defect") == 1 and "in broken" in text
    assert text.splitlines()[-1] == (
        "error: this is a fault of xformer-train; please report it with the traceback above"
    )
    log = (tmp_path / "runs" / "run" / "log" / "rank0.log").read_text()
    assert log.count("ValueError: a defect") == 1 and "in broken" in log


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"),
            r"2 GiB; lower training\.micro_batch",
        ),
        (UserError("too many sequences"), "too many sequences"),
    ],
)
def test_what_a_device_or_a_kernel_refuses_is_told_as_something_to_change(error, message, tmp_path, monkeypatch):
    def refusing(*args):
        raise error

    monkeypatch.setattr(loop, "train_step", refusing)
    with pytest.raises(UserError, match=message):
        start(write_config(tmp_path))


def test_a_key_that_a_section_of_deepspeed_does_not_have_is_named(tmp_path):
    with pytest.raises(UserError, match=r"deepspeed\.zero_optimization\.no_such_key: unknown DeepSpeed key"):
        start(write_config(tmp_path), "deepspeed.zero_optimization.no_such_key=1")


def test_a_value_that_only_deepspeed_knows_to_be_wrong_is_named_before_anything_is_prepared(tmp_path):
    with pytest.raises(UserError, match=r"deepspeed: DeepSpeed refuses these settings .*offload_optimizer\.ratio"):
        start(write_config(tmp_path), "deepspeed.zero_optimization={stage: 1, offload_optimizer: {ratio: 7}}")
    assert not (tmp_path / "runs").exists()


def test_a_cpu_without_memory_is_told_what_was_held_and_what_would_hold_less(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "train_step", lambda *args: torch.empty(2**50))
    said = r"^out of memory: can't allocate memory: you tried to allocate \d+ bytes"
    with pytest.raises(UserError, match=said) as error:
        start(write_config(tmp_path, training__micro_batch_size=2))
    assert "; lower training.micro_batch_size 2 or data.max_seq_length 32, set training.act" in str(error.value)


def test_a_finished_schedule_that_is_made_longer_is_told_with_the_jump_of_the_learning_rate(tmp_path, capsys):
    path = write_config(tmp_path, training__max_steps=4, schedule={"type": "cosine"}, optimizer__lr=1e-3)
    start(path)
    start(path, resume=True)
    assert "jumps" not in capsys.readouterr().err
    start(path, "training.max_steps=8", resume=True)
    said = "the schedule was 4 steps long and is 8 steps now, so the learning rate jumps from 0.00e+00 to 5.00e-04; "
    assert said in capsys.readouterr().err
