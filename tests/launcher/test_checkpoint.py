"""Checkpoints of a tiny network: exact resume, whole or not at all, found by id, refused when they do not fit."""

import json
import os
import pickle
import random
import resource

import numpy as np
import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from distributed.spawn import run_processes
from distributed.tiny import MODEL, resume_worker, tiny_engine, train, whole_weights

from xformer_train.launcher import checkpoint
from xformer_train.launcher.checkpoint_files import read_file, write_file
from xformer_train.launcher.topology import quiet, start_processes, stop_processes


@pytest.fixture(scope="module")
def alone():
    quiet(debug=False)
    topology = start_processes(60)
    yield topology
    stop_processes()


@pytest.fixture(scope="module")
def engine(alone):
    engine = tiny_engine(alone, 0, "fp32")
    train(engine, alone, 0, 1)
    return engine


def save(engine, folder, checkpoint_id, step, topology, extra_files=None, **state):
    checkpoint.save(engine, folder, checkpoint_id, {"step": step, "model": MODEL, **state}, extra_files or {}, topology)


def bare_checkpoint(folder, checkpoint_id, step):
    """Enough of a checkpoint to be found."""
    (folder / checkpoint_id).mkdir(parents=True)
    facts = {"zero_stage": 0, "world_size": 1, "precision": "fp32"}
    state = {"step": step, "model": MODEL, "engine": facts, "files": {}}
    (folder / checkpoint_id / "state.json").write_text(json.dumps(state))


def equal_weights(ones, others):
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


# Resume


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_at_stage_0_gives_the_same_bits_as_no_stop(alone, tmp_path, precision):
    straight = tiny_engine(alone, 0, precision)
    record = train(straight, alone, 0, 5)

    before = tiny_engine(alone, 0, precision)
    assert train(before, alone, 0, 3) == record[:3]
    save(before, tmp_path, "three", 3, alone)
    after = tiny_engine(alone, 0, precision)
    torch.manual_seed(5)
    assert checkpoint.load(after, tmp_path / "three", MODEL, alone)
    assert train(after, alone, 3, 5) == record[3:]
    assert equal_weights(whole_weights(after), whole_weights(straight))
    assert after.global_steps == straight.global_steps


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder, run_processes(resume_worker, 2, folder, [1, 2, 3])


def test_resume_on_two_processes_at_stages_1_to_3_gives_the_same_bits_as_no_stop(two_processes):
    for results in two_processes[1]:
        for stage in (1, 2, 3):
            record, weights = results[f"straight {stage}"]
            resumed_record, resumed_weights = results[f"resumed {stage}"]
            assert resumed_record == record
            assert equal_weights(resumed_weights, weights)


def test_weights_are_read_from_the_shards_of_two_processes(two_processes):
    for results in two_processes[1]:
        for stage in (1, 2, 3):
            assert equal_weights(*results[f"saved {stage}"])


def test_one_process_with_a_full_disk_stops_the_save_on_all(two_processes):
    folder = two_processes[0] / "full"
    for results in two_processes[1]:
        message, ids, left, ids_after = results["full disk"]
        assert message.startswith(f"checkpoint second could not be saved in {folder}: No space left on device;")
        assert (ids, left, ids_after) == ("first", "first,latest", "first,second")


def test_every_global_generator_goes_on_where_it_was(alone, engine, tmp_path):
    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), np.random.randn(), random.random()

    np.random.randn()  # leaves half of a pair of normal numbers in numpy's state
    save(engine, tmp_path, "a", 1, alone)
    expected = draw()
    assert draw() != expected
    assert checkpoint.load(engine, tmp_path / "a", MODEL, alone)
    assert draw() == expected


def test_random_state_is_left_alone_when_the_number_of_processes_changed(alone, engine, tmp_path):
    save(engine, tmp_path, "a", 1, alone)
    state = json.loads((tmp_path / "a/state.json").read_text())
    state["engine"]["world_size"] = 2
    (tmp_path / "a/state.json").write_text(json.dumps(state))
    before = torch.get_rng_state()
    assert not checkpoint.load(engine, tmp_path / "a", MODEL, alone)
    assert torch.equal(torch.get_rng_state(), before)


def test_settings_changed_since_the_checkpoint_stay_changed(alone, engine, tmp_path):
    save(engine, tmp_path, "a", 1, alone)
    for stage in (0, 2):
        later = tiny_engine(alone, stage, "fp32")
        save(later, tmp_path, f"stage{stage}", 1, alone)
        groups = later.optimizer.param_groups
        groups[0]["weight_decay"], groups[1]["betas"] = 0.5, (0.8, 0.9)
        checkpoint.load(later, tmp_path / f"stage{stage}", MODEL, alone)
        groups = later.optimizer.param_groups
        assert (groups[0]["weight_decay"], groups[1]["weight_decay"], groups[1]["betas"]) == (0.5, 0.0, (0.8, 0.9))


def test_weights_alone_start_a_new_optimizer(alone, engine, tmp_path):
    save(engine, tmp_path, "a", 1, alone)
    fresh = tiny_engine(alone, 0, "fp32").module
    assert not equal_weights(fresh.parameters(), engine.module.parameters())
    checkpoint.load_weights(fresh, tmp_path / "a", MODEL, alone)
    assert equal_weights(fresh.parameters(), engine.module.parameters())


# Saving


def test_state_and_extra_files_are_inside_and_latest_names_the_newest(alone, engine, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_text("{}")
    extra = {"config.resolved.yaml": "name: run\n", "tokenizer": tmp_path / "tokenizer"}
    folder = tmp_path / "run/checkpoints"
    save(engine, folder, "a", 1, alone, extra, samples=24)
    save(engine, folder, "b", 2, alone, extra)
    assert (folder / "latest").read_text().strip() == "b"
    assert (folder / "a/config.resolved.yaml").read_text() == "name: run\n"
    assert (folder / "a/tokenizer/tokenizer.json").read_text() == "{}"
    state = checkpoint.read_state(folder / "a")
    assert (state["step"], state["samples"], state["engine"]["world_size"]) == (1, 24, 1)
    assert {"tokenizer/tokenizer.json", "rng_replica0.pt", "mp_rank_00_model_states.pt"} <= state["files"].keys()
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b", "latest"]


def test_an_existing_checkpoint_is_never_overwritten(alone, engine, tmp_path):
    save(engine, tmp_path, "a", 1, alone)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    with pytest.raises(ValueError, match="never overwritten"):
        save(engine, tmp_path, "a", 1, alone)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()} == before


@pytest.mark.parametrize("bad_id", ["latest", "a/b", ".hidden", "..", ""])
def test_an_id_that_is_no_plain_folder_name_is_refused(alone, engine, tmp_path, bad_id):
    with pytest.raises(ValueError, match=r"checkpoint\.id_format"):
        save(engine, tmp_path, bad_id, 1, alone)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_earlier_checkpoints_and_nothing_else(alone, engine, tmp_path):
    save(engine, tmp_path, "a", 1, alone)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))  # the system refuses larger files, as a full disk does
    try:
        with pytest.raises(OSError, match=f"checkpoint b could not be saved in {tmp_path}: File too large; free space"):
            save(engine, tmp_path, "b", 2, alone)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoint.list_ids(tmp_path) == ["a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "latest"]
    checkpoint.load(engine, checkpoint.resolve(tmp_path, "latest"), MODEL, alone)
    save(engine, tmp_path, "b", 2, alone)


def test_a_failure_in_the_last_part_of_a_save_leaves_nothing(alone, engine, tmp_path):
    with pytest.raises(OSError, match="could not be saved"):
        save(engine, tmp_path, "a", 1, alone, {"config.yaml": tmp_path / "absent.yaml"})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_file_is_refused_in_one_sentence(alone, engine, tmp_path):
    (tmp_path / "checkpoints").write_text("mine")
    with pytest.raises(OSError, match="could not be saved"):
        save(engine, tmp_path / "checkpoints", "a", 1, alone)
    assert (tmp_path / "checkpoints").read_text() == "mine"


def test_leftovers_of_an_interrupted_save_are_removed_and_other_folders_are_not(alone, engine, tmp_path):
    (tmp_path / ".dead.tmp").mkdir()
    (tmp_path / ".dead.tmp/state.json").write_text("{}")
    (tmp_path / ".mine.tmp").mkdir()
    (tmp_path / ".mine.tmp/notes.txt").write_text("mine")
    assert checkpoint.list_ids(tmp_path) == []
    save(engine, tmp_path, "dead", 1, alone)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.tmp", "dead", "latest"]


# Finding


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "run/checkpoints"
    for step in (900, 1000, 1100):  # by name 1000 comes before 900
        bare_checkpoint(folder, f"step{step}", step)
    (folder / "latest").write_text("step1100\n")
    (folder / "notes").mkdir()
    return tmp_path / "run"


def test_ids_come_in_order_of_step(run_folder):
    assert checkpoint.list_ids(run_folder / "checkpoints") == ["step900", "step1000", "step1100"]
    assert checkpoint.list_ids(run_folder / "absent") == []


@pytest.mark.parametrize(
    ("place", "wanted", "found"),
    [
        (".", "latest", "step1100"),
        ("checkpoints", "latest", "step1100"),
        (".", "step1000", "step1000"),
        (".", "step9", "step900"),
        ("checkpoints/step900", "latest", "step900"),
        ("checkpoints/step900", "step900", "step900"),
    ],
)
def test_a_checkpoint_is_found_by_id_prefix_or_latest(run_folder, place, wanted, found):
    assert checkpoint.resolve(run_folder / place, wanted) == run_folder / "checkpoints" / found


def test_an_exact_id_wins_over_longer_ids_that_begin_with_it(tmp_path):
    bare_checkpoint(tmp_path, "step1", 1)
    bare_checkpoint(tmp_path, "step10", 10)
    assert checkpoint.resolve(tmp_path, "step1").name == "step1"


@pytest.mark.parametrize(
    ("place", "wanted", "message"),
    [
        (".", "step1", "fits 2 checkpoints.*step900, step1000, step1100"),
        (".", "step7", "fits no checkpoint.*step900, step1000, step1100"),
        ("absent", "latest", "not a folder"),
        ("checkpoints/notes", "latest", "no complete checkpoint"),
        ("checkpoints/step900", "step1000", "another"),
    ],
)
def test_a_checkpoint_that_is_not_there_or_not_one_is_an_error(run_folder, place, wanted, message):
    with pytest.raises(ValueError, match=message):
        checkpoint.resolve(run_folder / place, wanted)


def test_latest_that_is_missing_or_names_nothing_is_an_error_and_not_a_fresh_start(run_folder):
    pointer = run_folder / "checkpoints/latest"
    for content in ("step1200\n", ""):
        pointer.write_text(content)
        with pytest.raises(ValueError, match=r"not there.*step1100"):
            checkpoint.resolve(run_folder, "latest")
    pointer.unlink()
    with pytest.raises(ValueError, match=r"missing.*step1100"):
        checkpoint.resolve(run_folder, "latest")


def test_pruning_keeps_the_newest_the_latest_and_the_named(run_folder):
    folder = run_folder / "checkpoints"
    bare_checkpoint(folder, "step1200", 1200)
    bare_checkpoint(folder, "step1300", 1300)
    assert checkpoint.prune(folder, 1, {"step900"}) == ["step1000", "step1200"]
    assert checkpoint.list_ids(folder) == ["step900", "step1100", "step1300"]
    assert checkpoint.prune(folder, 5) == []
    assert (folder / "notes").is_dir()


def test_checkpoints_beyond_the_step_a_run_begins_at_are_refused(run_folder):
    folder = run_folder / "checkpoints"
    checkpoint.refuse_later(folder, 1100)
    with pytest.raises(ValueError, match=r"after step 900.*step1000, step1100"):
        checkpoint.refuse_later(folder, 900)


# Refusing


def test_a_checkpoint_of_another_model_is_refused_with_both_values(alone, engine, tmp_path):
    save(engine, tmp_path, "a", 1, alone)
    weights = whole_weights(engine)
    other = MODEL | {"hidden_size": 99, "vocab_size": 8}
    with pytest.raises(
        ValueError, match="another model: hidden_size is 13 there and 99 here; vocab_size is None there and 8"
    ):
        checkpoint.load(engine, tmp_path / "a", other, alone)
    assert equal_weights(weights, whole_weights(engine))
    checkpoint.load(engine, tmp_path / "a", MODEL | {"hidden_dropout_prob": 0.0}, alone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero_stage": 2}, "ZeRO stage 2, this run has stage 0"),
        ({"precision": "bf16"}, "trained in bf16, this run has fp32"),
    ],
)
def test_a_checkpoint_of_another_stage_or_precision_is_refused(alone, engine, tmp_path, change, message):
    save(engine, tmp_path, "a", 1, alone)
    state = json.loads((tmp_path / "a/state.json").read_text())
    state["engine"] |= change
    (tmp_path / "a/state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=message):
        checkpoint.load(engine, tmp_path / "a", MODEL, alone)


def test_a_sharded_checkpoint_of_another_number_of_processes_is_refused(alone, tmp_path):
    sharded = tiny_engine(alone, 1, "fp32")
    save(sharded, tmp_path, "a", 1, alone)
    state = json.loads((tmp_path / "a/state.json").read_text())
    state["engine"]["world_size"] = 4
    (tmp_path / "a/state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"by 4 processes.*this run has 1"):
        checkpoint.load(sharded, tmp_path / "a", MODEL, alone)


def test_missing_and_cut_files_are_named(alone, engine, tmp_path):
    save(engine, tmp_path, "a", 1, alone)
    file = tmp_path / "a/rng_replica0.pt"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"rng_replica0\.pt has {len(content) - 1} bytes instead of {len(content)}"):
        checkpoint.load(engine, tmp_path / "a", MODEL, alone)
    file.unlink()
    with pytest.raises(ValueError, match=r"rng_replica0\.pt is missing"):
        checkpoint.load(engine, tmp_path / "a", MODEL, alone)


@pytest.mark.parametrize("content", ["", "[1]", '{"step": 1}', "{"])
def test_a_broken_state_file_is_refused(tmp_path, content):
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(ValueError, match="choose another"):
        checkpoint.read_state(tmp_path)
    with pytest.raises(ValueError, match=r"state\.json is missing"):
        checkpoint.read_state(tmp_path / "absent")


class Evil:
    def __init__(self, folder):
        self.command = f"touch {folder}/executed"

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "rng_replica0.pt"])
@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_code_in_a_checkpoint_is_not_executed(alone, engine, tmp_path, name, kind):
    save(engine, tmp_path, "a", 1, alone)
    file = tmp_path / "a" / name
    if kind == "torch":
        torch.save({"module": Evil(tmp_path)}, file)
    else:
        file.write_bytes(pickle.dumps({"module": Evil(tmp_path)}, protocol=2))
    state = json.loads((tmp_path / "a/state.json").read_text())
    state["files"][name] = file.stat().st_size
    (tmp_path / "a/state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="could run any code"):
        checkpoint.load(engine, tmp_path / "a", MODEL, alone)
    assert not (tmp_path / "executed").exists()


def test_code_in_a_stage_3_shard_is_not_executed(alone, tmp_path):
    sharded = tiny_engine(alone, 3, "fp32")
    save(sharded, tmp_path, "a", 1, alone)
    assert checkpoint.weights(tmp_path / "a").keys() == dict(sharded.module.named_parameters()).keys()
    torch.save(Evil(tmp_path), tmp_path / "a/zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(ValueError, match="could run any code"):
        checkpoint.weights(tmp_path / "a")
    assert not (tmp_path / "executed").exists()


def test_the_dynamic_loss_scale_of_fp16_survives_safe_loading(tmp_path):
    scaler = DynamicLossScaler(2.0**10, 2.0, 1000, 1.0, 2, False, dtype=torch.half)
    write_file({"loss_scaler": scaler}, tmp_path / "scaler.pt")
    assert read_file(tmp_path / "scaler.pt")["loss_scaler"].cur_scale == 2.0**10
