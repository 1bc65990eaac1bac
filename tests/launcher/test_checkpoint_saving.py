"""Saves of a tiny network: whole or not at all, beside training, whatever fails and whenever the process dies."""

import resource

import pytest
from checkpoints import save
from distributed.tiny import MODEL, tiny_engine, train

from xformer_train.launcher import checkpoint, checkpoint_store
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
    state = checkpoint_store.read_state(folder / "a")
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
    assert checkpoint_store.list_ids(tmp_path) == ["a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "latest"]
    checkpoint.load(engine, checkpoint_store.resolve(tmp_path, "latest"), MODEL, alone)
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
    assert checkpoint_store.list_ids(tmp_path) == []
    save(engine, tmp_path, "dead", 1, alone)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.tmp", "dead", "latest"]
