"""Saves of a tiny network: whole or not at all, beside training, whatever fails and whenever the process dies."""

import contextlib
import errno
import os
import resource
import shutil
import stat
import threading
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from distributed.workers.killed_saves import killed_saves_worker
from helpers.checkpoints import list_ids, save
from helpers.spawn import run_processes
from helpers.tiny import MODEL, tiny_engine, train, whole_weights

from xformer_train.launcher.checkpoint import loading, store
from xformer_train.launcher.checkpoint import saving as checkpoint_saving
from xformer_train.launcher.checkpoint.host_copy import HostCopies
from xformer_train.launcher.checkpoint.saving import CheckpointSaver
from xformer_train.launcher.config.schema import CheckpointConfig
from xformer_train.launcher.processes.topology import quiet, start_processes, stop_processes


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
    state = store.read_state(folder / "a")
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
    assert list_ids(tmp_path) == ["a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "latest"]
    loading.load(engine, store.resolve(tmp_path, "latest"), MODEL, alone)
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
    assert list_ids(tmp_path) == []
    save(engine, tmp_path, "dead", 1, alone)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.tmp", "dead", "latest"]


def test_the_first_save_makes_the_name_of_its_folder_survive_a_power_cut(alone, engine, tmp_path, monkeypatch):
    flushed, flush = [], checkpoint_saving.flush_folder
    monkeypatch.setattr(checkpoint_saving, "flush_folder", lambda folder: (flushed.append(folder), flush(folder)))
    save(engine, tmp_path / "run/checkpoints", "a", 1, alone)
    assert flushed == [tmp_path / "run", tmp_path / "run/checkpoints", tmp_path / "run/checkpoints"]


def test_a_file_system_that_cannot_flush_folders_takes_checkpoints(alone, engine, tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    save(engine, tmp_path, "a", 1, alone)
    assert store.problems_of(tmp_path / "a") == []


# Beside training


@contextlib.contextmanager
def held_up(monkeypatch):
    """Within, no file of tensors is written; gives the events, by checkpoint id, that let the writing begin."""
    gates, write = defaultdict(threading.Event), checkpoint_saving.write_file

    def wait_and_write(value, path):
        assert gates[path.parent.name.removeprefix(".").removesuffix(".tmp")].wait(60)
        return write(value, path)

    monkeypatch.setattr(checkpoint_saving, "write_file", wait_and_write)
    yield gates


def saver(engine, folder, topology, **settings):
    return CheckpointSaver(engine, folder, topology, CheckpointConfig(**settings))


def facts(step):
    return {"step": step, "model": MODEL}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_is_saved_is_the_state_of_its_step_though_training_goes_on(alone, tmp_path, monkeypatch, stage):
    engine = tiny_engine(alone, stage, "fp32")
    train(engine, alone, 0, 2)
    weights = whole_weights(engine)
    with held_up(monkeypatch) as gates, saver(engine, tmp_path, alone) as saving:
        saving.save("a", facts(2), {})
        record = train(engine, alone, 2, 4)
        assert list_ids(tmp_path) == []
        gates["a"].set()
    after = tiny_engine(alone, stage, "fp32")
    loading.load(after, tmp_path / "a", MODEL, alone)
    assert all(map(torch.equal, whole_weights(after), weights))
    assert train(after, alone, 2, 4) == record


def test_a_save_waits_for_the_one_before_and_the_end_for_the_last(alone, engine, tmp_path, monkeypatch):
    with held_up(monkeypatch) as gates, saver(engine, tmp_path, alone) as saving:
        saving.save("a", facts(1), {})
        threading.Timer(0.05, gates["a"].set).start()
        saving.save("b", facts(2), {})
        assert list_ids(tmp_path) == ["a"]
        gates["b"].set()
    assert list_ids(tmp_path) == ["a", "b"]


def test_an_error_of_training_waits_for_the_save_in_progress(alone, engine, tmp_path, monkeypatch):
    with pytest.raises(KeyError), held_up(monkeypatch) as gates, saver(engine, tmp_path, alone) as saving:
        saving.save("a", facts(1), {})
        threading.Timer(0.05, gates["a"].set).start()
        raise KeyError
    assert list_ids(tmp_path) == ["a"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failed_save_is_told_and_the_next_one_tries_again(alone, engine, tmp_path, capsys, asynchronous):
    with saver(engine, tmp_path, alone, keep_last=1, asynchronous=asynchronous) as saving:
        saving.save("a", facts(1), {})
        saving.wait()
        saving.save("b", facts(2), {"config.yaml": tmp_path / "absent.yaml"})
        saving.wait()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "latest"]
        saving.save("c", facts(3), {})
    assert list_ids(tmp_path) == ["c"]
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: checkpoint b could not be saved in {tmp_path}: No such file or directory; ")
    assert warning.endswith("if steps are left, training goes on and the next save tries again")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_last_save_that_fails_ends_with_its_error(alone, engine, tmp_path, asynchronous):
    with (
        pytest.raises(OSError, match="checkpoint b could not be saved"),
        saver(engine, tmp_path, alone, asynchronous=asynchronous) as saving,
    ):
        saving.save("a", facts(1), {})
        saving.save("b", facts(2), {"config.yaml": tmp_path / "absent.yaml"})
    assert list_ids(tmp_path) == ["a"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_error_in_a_save_that_is_not_the_systems_ends_training(alone, engine, tmp_path, monkeypatch, asynchronous):
    monkeypatch.setattr(checkpoint_saving, "write_file", lambda value, path: 1 / 0)
    with pytest.raises(ZeroDivisionError), saver(engine, tmp_path, alone, asynchronous=asynchronous) as saving:
        saving.save("a", facts(1), {})
        saving.save("b", facts(2), {})


def test_no_memory_for_the_copy_is_a_failed_save_with_its_remedy(alone, engine, tmp_path, monkeypatch):
    def allocate(*size, **options):
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(HostCopies, "_copy", allocate)
    with (
        pytest.raises(OSError, match=r"can't allocate memory.*checkpoint\.asynchronous=false"),
        saver(engine, tmp_path, alone) as saving,
    ):
        saving.save("a", facts(1), {})
    assert not list(tmp_path.iterdir())


def test_a_disk_that_gives_back_other_bytes_gets_no_checkpoint_and_nothing_is_pruned(
    alone, engine, tmp_path, monkeypatch
):
    read = checkpoint_saving.read_record

    def read_badly(path, **options):
        record = read(path, **options)
        return record._replace(sha256="0") if path.parent.name == ".b.tmp" and path.suffix == ".pt" else record

    monkeypatch.setattr(checkpoint_saving, "read_record", read_badly)
    with pytest.raises(OSError, match="reads back otherwise"), saver(engine, tmp_path, alone, keep_last=1) as saving:
        saving.save("a", facts(1), {})
        saving.save("b", facts(2), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "latest"]


def test_the_newest_stay_and_the_multiples(alone, engine, tmp_path):
    with saver(engine, tmp_path, alone, keep_last=2, keep_every_steps=4) as saving:
        for step in range(3, 9):
            saving.save(f"step{step}", facts(step), {})
    assert list_ids(tmp_path) == ["step4", "step7", "step8"]


def test_checkpoints_that_were_moved_to_another_disk_and_linked_back_are_pruned_as_links(alone, engine, tmp_path):
    folder, disk = tmp_path / "checkpoints", tmp_path / "disk"
    save(engine, folder, "step1", 1, alone)
    (folder / "step1").rename(disk)
    (folder / "step1").symlink_to(disk)
    with saver(engine, folder, alone, keep_last=1) as saving:
        for step in (2, 3):
            saving.save(f"step{step}", facts(step), {})
    assert list_ids(folder) == ["step3"]
    assert store.problems_of(disk) == []
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step3"]


@pytest.mark.parametrize("stuck", [".step2.tmp", ".step1.tmp", "step1"])
def test_what_cannot_be_removed_is_a_warning_and_not_the_end_of_saving(
    alone, engine, tmp_path, monkeypatch, capsys, stuck
):
    save(engine, tmp_path, stuck.replace(".tmp", "").strip("."), 1, alone)
    if stuck.startswith("."):
        (tmp_path / stuck.replace(".tmp", "").strip(".")).rename(tmp_path / stuck)
    (tmp_path / stuck / "rng_replica0.pt").rename(tmp_path / stuck / "immutable")
    unlink = Path.unlink

    def refuse(path, **options):
        if path.name == "immutable":
            raise PermissionError(1, "Operation not permitted")
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", refuse)
    with saver(engine, tmp_path, alone, keep_last=1) as saving:
        for step in (2, 3):
            saving.save(f"step{step}", facts(step), {})
    assert list_ids(tmp_path) == ["step3"]
    err = capsys.readouterr().err
    assert "could not be saved" not in err
    assert "Operation not permitted" in err


def test_the_mark_of_a_folder_without_checkpoints_goes_with_the_first_save(alone, engine, tmp_path):
    folder = tmp_path / "checkpoints"
    assert store.has_lost_all(folder)
    store.make_folder(folder)
    assert not store.has_lost_all(folder)
    save(engine, folder, "step1", 1, alone)
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step1"]
    store.make_folder(folder)
    assert not store.has_lost_all(folder)
    shutil.rmtree(folder / "step1")
    assert store.has_lost_all(folder)


# A process that dies


@pytest.mark.skipif(torch.cuda.is_available(), reason="forks, which CUDA does not survive")
def test_a_process_killed_at_any_point_of_a_save_leaves_whole_checkpoints(tmp_path):
    (endings,) = run_processes(killed_saves_worker, 1, tmp_path)
    assert len(endings) > 30  # or nothing was counted
    seen = list(dict.fromkeys(endings))
    assert seen == [(("a", "b"), "b"), (("a", "b", "c"), "b"), (("a", "b", "c"), "c"), (("b", "c"), "c"), (("c",), "c")]
