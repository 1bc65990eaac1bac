"""Which starts of a run are refused, which go on, and what is left of them."""

import json
import shutil

import pytest
import torch
from helpers.runs import losses, write_config
from helpers.whole_runs import assert_same_run, start

from xformer_train.launcher.config.loading import load_config
from xformer_train.launcher.optim.kind import OptimizerKind
from xformer_train.launcher.optim.optimizer import OPTIMIZERS
from xformer_train.launcher.training import loop
from xformer_train.recipes.data.tokenizer import load_tokenizer


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

    def sgd(model, config, group, precision):
        return torch.optim.SGD(model.parameters(), lr=config.lr, momentum=0.9)

    monkeypatch.setitem(OPTIMIZERS, "lamb", OptimizerKind(sgd))
    shutil.rmtree(tmp_path / "cache")
    where = ("optimizer.type=lamb", f"load.path={tmp_path}/runs/run")
    for sets in (where, (*where, "name=second")):
        with pytest.raises(
            ValueError, match=r"kept exp_avg, exp_avg_sq of its parameters; optimizer\.type=lamb keeps momentum_buffer"
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
