"""Whole runs in one process: exact resume, phases, evaluation, what is refused and what is left behind."""

import json
import shutil
import sys

import pytest
import torch
from helpers.checkpoints import changed_state
from helpers.runs import BERT, GPT, LLAMA, MODERNBERT, PACKED, losses, merged, metrics, weights, write_config

from xformer_train.kernels.errors import UserError
from xformer_train.launcher.commands import app as cli
from xformer_train.launcher.config.loading import load_config
from xformer_train.launcher.optim.kind import OptimizerKind
from xformer_train.launcher.optim.optimizer import OPTIMIZERS
from xformer_train.launcher.processes.topology import quiet
from xformer_train.recipes import RECIPES
from xformer_train.recipes.data.stream import prepare_data
from xformer_train.recipes.data.tokenizer import load_tokenizer

quiet(debug=False)

from xformer_train.launcher.training import loop  # noqa: E402 - DeepSpeed is quiet only when told before
from xformer_train.launcher.training.train import run  # noqa: E402


def start(path, *sets, resume=False):
    run(load_config(path, list(sets)), resume=resume)


def assert_same_run(folder, straight, resumed, step):
    assert losses(folder / "runs" / straight) == losses(folder / "runs" / resumed)
    checkpoint_id = f"step{step:08d}"
    ours = weights(folder / "runs" / straight / "checkpoints" / checkpoint_id)
    theirs = weights(folder / "runs" / resumed / "checkpoints" / checkpoint_id)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


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


@pytest.mark.parametrize("how", ["removed", "emptied", "of a disk that is not there", "of an empty disk"])
def test_a_run_whose_checkpoints_are_gone_never_starts_anew_by_itself(tmp_path, how):
    path = write_config(tmp_path)
    start(path, "training.max_steps=3")
    folder, kept = tmp_path / "runs/run/checkpoints", tmp_path / "kept"
    folder.rename(kept)
    if how == "emptied":
        folder.mkdir()
        (folder / "latest").write_text("step00000003\n")
    elif how == "of an empty disk":
        (tmp_path / "mnt").mkdir()
        folder.symlink_to(tmp_path / "mnt")
    elif how != "removed":
        folder.symlink_to(tmp_path / "mnt")
    before = (folder.parent / "metrics.jsonl").read_text()
    message = (
        "cannot list the checkpoints" if "not there" in how else r"holds metrics of a run, but .*checkpoints no check"
    )
    with pytest.raises(ValueError, match=message):
        start(path, resume=True)
    with pytest.raises(ValueError, match="already holds a run"):
        start(path)
    assert (folder.parent / "metrics.jsonl").read_text() == before
    folder.unlink(missing_ok=True) if folder.is_symlink() else shutil.rmtree(folder, ignore_errors=True)
    kept.rename(folder)
    start(path, "training.max_steps=4", resume=True)
    assert sorted(losses(folder.parent)) == [1, 2, 3, 4]


def test_a_run_that_died_before_its_first_checkpoint_starts_anew(tmp_path, monkeypatch):
    path = write_config(tmp_path, checkpoint__save_every_steps=5)
    train_step = loop.train_step

    def die(*args):
        if (tmp_path / "runs/run/metrics.jsonl").read_text().count("\n") == 3:
            raise ZeroDivisionError
        return train_step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", die)
        with pytest.raises(ZeroDivisionError):
            start(path)
    assert sorted(losses(tmp_path / "runs/run")) == [1, 2, 3]
    start(path, resume=True)
    assert sorted(losses(tmp_path / "runs/run")) == list(range(1, 13))
    assert sorted(path.name for path in (tmp_path / "runs/run/checkpoints").iterdir())[0] == "latest"


def test_what_is_in_the_way_of_a_later_save_ends_a_run_before_its_first_step(tmp_path):
    path = write_config(tmp_path)
    start(path, "training.max_steps=2")
    folder = tmp_path / "runs/run/checkpoints"
    (folder / "step00000007").mkdir()
    before = (folder.parent / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=r"checkpoint step00000007 is already in .*; move it away"):
        start(path, resume=True)
    assert (folder.parent / "metrics.jsonl").read_text() == before
    (folder / "step00000007").rmdir()
    with pytest.raises(
        ValueError, match=r"checkpoint\.id_format gives the id 'x{250}10+', which cannot be a folder's name"
    ):
        start(path, f"checkpoint.id_format={'x' * 250}{{step}}", resume=True)
    start(path, "training.max_steps=3", resume=True)


def test_a_file_in_the_place_of_the_checkpoints_ends_a_run_before_its_first_step(tmp_path):
    path = write_config(tmp_path)
    root = tmp_path / "runs/run"
    root.mkdir(parents=True)
    (root / "checkpoints").write_text("")
    with pytest.raises(ValueError, match=f"cannot list the checkpoints in {root}/checkpoints: Not a directory"):
        start(path, resume=True)
    assert not (root / "metrics.jsonl").exists()


def test_two_runs_one_of_which_has_the_name_of_a_pattern_of_the_other_keep_apart(tmp_path):
    path = write_config(tmp_path)
    start(path, "name=lr1", "training.max_steps=3", "seed=5")
    start(path, "name=lr[1]", "training.max_steps=3")
    start(path, "name=straight")
    start(path, "name=lr[1]", resume=True)
    assert_same_run(tmp_path, "straight", "lr[1]", 12)


def test_a_run_directory_explains_itself(tmp_path):
    path = write_config(tmp_path, checkpoint__save_every_steps=4, checkpoint__keep_last=2, logging__tensorboard=True)
    start(path)
    root = tmp_path / "runs" / "run"
    assert sorted(p.name for p in (root / "checkpoints").iterdir()) == ["latest", "step00000008", "step00000012"]
    assert (root / "checkpoints" / "latest").read_text().strip() == "step00000012"
    assert load_config(root / "config.resolved.yaml").config == load_config(path).config
    assert json.loads((root / "ds_config.json").read_text())["train_batch_size"] == 8
    recorded = json.loads((root / "env.json").read_text())["packages"]["torch"]
    assert recorded.partition("+")[0] == torch.__version__.partition("+")[0]  # a CUDA build's package has no "+cu130"
    assert list((root / "tb").glob("events*"))
    assert (root / "log" / "rank0.log").read_text()
    for name in ("tokenizer", "checkpoints/step00000012/tokenizer"):
        assert load_tokenizer(root / name).vocab_size >= 256


def test_another_run_is_never_written_into(tmp_path):
    path = write_config(tmp_path)
    start(path, "training.max_steps=1")
    before = (tmp_path / "runs" / "run" / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=r"already holds a run; continue it with --resume auto"):
        start(path)
    assert (tmp_path / "runs" / "run" / "metrics.jsonl").read_text() == before


def test_a_start_that_failed_may_be_tried_again(tmp_path):
    path = write_config(tmp_path)
    with pytest.raises(ValueError, match=r"fewer than training.train_batch_size=8,192"):
        start(path, "training.train_batch_size=8192")
    start(path, "training.max_steps=1")


def test_a_run_is_not_continued_on_other_data(tmp_path):
    path = write_config(tmp_path)
    start(path, "training.max_steps=1")
    with pytest.raises(ValueError, match="other data, another sequence length or another seed"):
        start(path, "data.max_seq_length=48", resume=True)


def test_a_checkpoint_of_another_model_is_refused_with_the_differing_keys(tmp_path):
    start(write_config(tmp_path, name="first"), "training.max_steps=1")
    path = write_config(tmp_path, name="second", load__path=str(tmp_path / "runs" / "first"))
    with pytest.raises(ValueError, match=r"another model: num_hidden_layers is 2 there and 3 here"):
        start(path, "model.num_hidden_layers=3")


def test_a_start_that_is_refused_leaves_the_resolved_config_of_the_run(tmp_path):
    path = write_config(tmp_path)
    start(path, "training.max_steps=1")
    resolved = tmp_path / "runs" / "run" / "config.resolved.yaml"
    before = resolved.read_text()
    with pytest.raises(ValueError, match=r"another model"):
        start(path, "model.num_hidden_layers=3", resume=True)
    assert resolved.read_text() == before


def test_an_optimizer_that_keeps_something_else_is_refused_before_data_are_prepared(tmp_path, monkeypatch):
    path = write_config(tmp_path)
    start(path, "training.max_steps=2")
    start(path, "name=other", "optimizer.type=lamb", f"load.path={tmp_path}/runs/run", "training.max_steps=3")

    def sgd(model, config, group):
        return torch.optim.SGD(model.parameters(), lr=config.lr, momentum=0.9)

    monkeypatch.setitem(OPTIMIZERS, "lamb", OptimizerKind(sgd))
    shutil.rmtree(tmp_path / "cache")
    where = ("optimizer.type=lamb", f"load.path={tmp_path}/runs/run")
    for sets in (where, (*where, "name=second")):
        with pytest.raises(
            ValueError, match=r"kept exp_avg, exp_avg_sq of each .* optimizer\.type=lamb keeps momentum_buffer"
        ):
            start(path, *sets, resume=True)
    assert not (tmp_path / "cache").exists()
    start(path, *where, "name=third", "load.what=weights", "training.max_steps=1")


def test_a_wrong_id_lists_the_ids_there_are(tmp_path):
    start(write_config(tmp_path, name="first"), "training.max_steps=1")
    path = write_config(tmp_path, name="second", load__path=str(tmp_path / "runs" / "first"), load__id="step9")
    with pytest.raises(ValueError, match=r"load.id=step9 fits no checkpoint.*step00000001"):
        start(path)
    assert not (tmp_path / "runs" / "second" / "checkpoints").exists()


def test_a_vocabulary_too_small_for_a_given_tokenizer_is_refused(tmp_path):
    start(write_config(tmp_path, name="first"), "training.max_steps=1")
    tokenizer = {"type": "auto", "path": str(tmp_path / "runs" / "first" / "tokenizer")}
    with pytest.raises(ValueError, match=r"model.vocab_size=100 is smaller than the tokenizer's 2\d\d symbols"):
        start(write_config(tmp_path, name="second", tokenizer=tokenizer, model__vocab_size=100))


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
