"""Folders of checkpoints: found by id, pruned, verified to the last byte."""

import platform
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.checkpoints import bare_checkpoint, changed_state, flip_byte, list_ids
from helpers.permissions import bound_by_permissions

from xformer_train.kernels.errors import RefusedError
from xformer_train.launcher.checkpoint import store


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "run/checkpoints"
    for step in (900, 1000, 1100):  # by name 1000 comes before 900
        bare_checkpoint(folder, f"step{step}", step)
    (folder / "latest").write_text("step1100\n")
    (folder / "notes").mkdir()
    return tmp_path / "run"


def test_ids_come_in_order_of_step(run_folder):
    assert list_ids(run_folder / "checkpoints") == ["step900", "step1000", "step1100"]
    assert list_ids(run_folder / "absent") == []


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
    assert store.resolve(run_folder / place, wanted) == run_folder / "checkpoints" / found


def test_an_exact_id_wins_over_longer_ids_that_begin_with_it(tmp_path):
    bare_checkpoint(tmp_path, "step1", 1)
    bare_checkpoint(tmp_path, "step10", 10)
    assert store.resolve(tmp_path, "step1").name == "step1"


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
        store.resolve(run_folder / place, wanted)


def test_latest_that_is_missing_or_names_nothing_is_an_error_and_not_a_fresh_start(run_folder):
    pointer = run_folder / "checkpoints/latest"
    for content in ("step1200\n", ""):
        pointer.write_text(content)
        with pytest.raises(ValueError, match=r"not there.*step1100"):
            store.resolve(run_folder, "latest")
    pointer.unlink()
    with pytest.raises(ValueError, match=r"missing.*step1100"):
        store.resolve(run_folder, "latest")


# Removing


def test_the_newest_stay_the_multiples_and_the_one_that_latest_names(run_folder):
    folder = run_folder / "checkpoints"
    for step in (1200, 1300):
        bare_checkpoint(folder, f"step{step}", step)
    assert store.surplus(folder, 1) == ["step900", "step1000", "step1200"]
    assert store.surplus(folder, 1, 500) == ["step900", "step1200"]
    assert store.surplus(folder, 2, 300) == ["step1000"]
    assert store.surplus(folder, 5) == []


def test_the_last_whole_checkpoint_stays_whatever_is_newer(tmp_path):
    for step in (1, 2, 3, 4):
        bare_checkpoint(tmp_path, f"step{step}", step, {"weights": "w"})
    assert store.surplus(tmp_path, 1) == ["step1", "step2", "step3"]
    for damaged in ("step4/weights", "step3/state.json"):
        flip_byte(tmp_path / damaged)
    assert store.surplus(tmp_path, 1) == ["step1"]
    flip_byte(tmp_path / "step2/weights")
    assert store.surplus(tmp_path, 1) == ["step2"]
    flip_byte(tmp_path / "step1/weights")
    assert store.surplus(tmp_path, 1) == []


def test_one_known_to_be_whole_is_not_read_again(tmp_path):
    for step in (1, 2):
        bare_checkpoint(tmp_path, f"step{step}", step, {"weights": "w"})
    flip_byte(tmp_path / "step2/weights")
    assert store.surplus(tmp_path, 1, verified_id="step2") == ["step1"]


def test_a_removal_that_is_cut_short_leaves_no_half_checkpoint_and_is_finished_later(tmp_path, monkeypatch):
    bare_checkpoint(tmp_path, "step1", 1, {"a": "", "b": "", "c": ""})
    unlink, calls = Path.unlink, []

    def fail_once(path, **options):
        calls.append(path)
        if len(calls) == 2:
            raise OSError("out")
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", fail_once)
    with pytest.raises(OSError, match="out"):
        store.remove(tmp_path, "step1")
    assert list_ids(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == [".step1.tmp"]
    assert store.remove_unfinished(tmp_path) == []
    assert not list(tmp_path.iterdir())


def test_what_another_process_removes_meanwhile_is_no_error(tmp_path, monkeypatch):
    """`checkpoints prune` while a run saves, which removes what it takes for leftovers."""
    bare_checkpoint(tmp_path, "step1", 1, {"a": "", "b": ""})
    unlink = Path.unlink

    def come_late(path, **options):
        unlink(path)
        raise FileNotFoundError

    monkeypatch.setattr(Path, "unlink", come_late)
    store.remove(tmp_path, "step1")
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_set_aside_is_none_of_the_checkpoints_any_more(tmp_path):
    for _ in range(2):
        bare_checkpoint(tmp_path, "step1", 1)
        name = store.set_aside(tmp_path, "step1")
    assert name == "step1.damaged2"
    assert store.entries(tmp_path) == []
    with pytest.raises(ValueError, match=r"checkpoint\.id_format"):
        store.check_id(tmp_path, "step1.damaged3")


@pytest.fixture
def elsewhere(tmp_path):
    """A folder of checkpoints, of which step1 was moved to another disk and linked back."""
    folder = tmp_path / "checkpoints"
    kept = bare_checkpoint(tmp_path / "disk", "moved", 1, {"weights": "w"})
    for step in (2, 3):
        bare_checkpoint(folder, f"step{step}", step)
    (folder / "step1").symlink_to(kept)
    return folder, kept


def test_of_a_checkpoint_that_is_a_link_only_the_link_is_removed(elsewhere):
    folder, kept = elsewhere
    assert list_ids(folder) == ["step1", "step2", "step3"]
    store.remove(folder, "step1")
    assert sorted(path.name for path in folder.iterdir()) == ["step2", "step3"]
    assert store.problems_of(kept) == []


def test_no_removal_follows_a_link(elsewhere, tmp_path):
    """Links in a checkpoint, and one whose removal was cut short."""
    folder, kept = elsewhere
    (folder / "step1").rename(folder / ".step1.tmp")
    (folder / "step2/files").symlink_to(kept)
    (folder / "step2/weights").symlink_to(kept / "weights")
    store.remove(folder, "step2")
    assert store.remove_unfinished(folder) == []
    assert [path.name for path in folder.iterdir()] == ["step3"]
    assert store.problems_of(kept) == []


def test_what_cannot_be_removed_is_told_and_takes_no_name(tmp_path, monkeypatch):
    for step in (1, 2):
        bare_checkpoint(tmp_path, f".step{step}.tmp", step, {"weights": "w"})
    bare_checkpoint(tmp_path, "step1", 1)
    unlink = Path.unlink

    def refuse(path, **options):
        if path.parent.name == ".step1.tmp":
            raise PermissionError(1, "Operation not permitted")
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", refuse)
    (problem,) = store.remove_unfinished(tmp_path)
    assert problem.startswith(
        f"{tmp_path}/.step1.tmp, left by an interrupted save, cannot be removed: Operation not perm"
    )
    store.remove(tmp_path, "step1")
    assert [path.name for path in tmp_path.iterdir()] == [".step1.tmp"]


# Listing


def test_a_folder_that_cannot_be_listed_is_an_error_and_never_an_empty_one(run_folder):
    folder = run_folder / "checkpoints"
    folder.chmod(0o000)
    with (
        bound_by_permissions(),
        pytest.raises(OSError, match=f"cannot list the checkpoints in {folder}: Permission denied; make it a"),
    ):
        store.entries(folder)
    folder.chmod(0o755)
    link = run_folder / "link"
    link.symlink_to(run_folder / "gone")
    with pytest.raises(OSError, match=r"cannot list the checkpoints in .*link: No such file"):
        store.entries(link)
    with pytest.raises(OSError, match=r"cannot list the checkpoints in .*latest: Not a directory"):
        store.entries(folder / "latest")


@pytest.mark.parametrize("hidden", ["step1000", "step1000/state.json"])
def test_one_checkpoint_that_cannot_be_read_is_a_damaged_one_among_others(run_folder, hidden):
    folder = run_folder / "checkpoints"
    mode = (folder / hidden).stat().st_mode
    (folder / hidden).chmod(0o000)
    with bound_by_permissions():
        first, *others = store.entries(folder)
    (folder / hidden).chmod(mode)
    assert (first.id, first.problem) == ("step1000", "state.json cannot be read (Permission denied)")
    assert [entry.id for entry in others] == ["step900", "step1100"]


def test_a_name_that_a_later_save_needs_is_told_at_the_start(tmp_path):
    store.check_ids(tmp_path / "absent", "step{step}", after=0)
    for name in ("step10", "notes 20", "step", "step11.damaged1", "latest"):
        (tmp_path / name).mkdir()
    (tmp_path / "epoch3-step0011").touch()
    store.check_ids(tmp_path, "step{step}", after=10)
    with pytest.raises(ValueError, match=f"checkpoint step10 is already in {tmp_path}"):
        store.check_ids(tmp_path, "step{step}", after=9)
    with pytest.raises(ValueError, match=f"checkpoint epoch3-step0011 is already in {tmp_path}"):
        store.check_ids(tmp_path, "epoch{epoch}-step{step:04d}", after=10)
    (tmp_path / "step12.12").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"checkpoint step12\.12 is already in"):
        store.check_ids(tmp_path, "step{step}.{step:02d}", after=10)


@pytest.mark.parametrize(
    "id_format", ["a" * 240 + "{step}", "ä" * 120 + "{step}", "step{step}.damaged", "x.damaged{step}"]
)
def test_a_form_of_ids_that_no_folder_can_have_is_told_at_the_start(tmp_path, id_format):
    with pytest.raises(
        ValueError, match=r"checkpoint\.id_format gives the id .*, which cannot be a folder's name; use at"
    ):
        store.check_ids(tmp_path, id_format, after=0)


def test_a_folder_of_checkpoints_that_cannot_be_written_is_told_at_the_start(run_folder):
    folder = run_folder / "checkpoints"
    before = sorted(folder.iterdir())
    store.check_ids(folder, "step{step}", after=1100)
    assert sorted(folder.iterdir()) == before
    folder.chmod(0o555)
    with bound_by_permissions(), pytest.raises(RefusedError, match=f"cannot write {folder}: Permission denied; free"):
        store.check_ids(folder, "step{step}", after=1100)
    folder.chmod(0o755)


# Verifying


def test_every_byte_of_every_file_is_guarded(tmp_path):
    path = bare_checkpoint(tmp_path, "step1", 1, {"weights": "abc", "config.yaml": "name: run\n"})
    assert store.problems_of(path) == []
    for file in ("weights", "config.yaml", "state.json"):
        content = (path / file).read_bytes()
        for position in range(len(content)):
            flip_byte(path / file, position)
            (problem,) = store.problems_of(path)
            assert problem.startswith(f"{file} "), (position, problem)
            (path / file).write_bytes(content)
    assert store.problems_of(path) == []


def test_missing_and_cut_files_are_found_without_reading(tmp_path):
    path = bare_checkpoint(tmp_path, "step1", 1, {"a": "abc", "b": "abc", "c": "abc"})
    (path / "a").unlink()
    (path / "b").write_text("ab")
    flip_byte(path / "c")
    assert store.problems_of(path, contents=False) == ["a is missing", "b has 2 bytes instead of 3"]
    assert store.problems_of(path)[2] == "c is not as it was written"


def test_a_checkpoint_that_lost_its_state_is_not_overlooked(tmp_path):
    path = bare_checkpoint(tmp_path, "step1", 1, {"weights.pt": "w"})
    (path / "state.json").unlink()
    (entry,) = store.entries(tmp_path)
    assert entry == ("step1", None, "state.json is missing")


def verify_own_share(path, rank):
    """What process `rank` finds of two processes on one machine and a third on another."""

    def gather(value):
        return ["here", "here", "there"] if value == platform.node() else [value]

    topology = SimpleNamespace(rank=rank, gather=gather, meet=lambda: None)
    return store.verify_together(path, topology)


def test_each_machine_reads_all_and_its_processes_share_the_reading(tmp_path):
    path = bare_checkpoint(tmp_path, "step1", 1, {"large": "large", "small": "s"})
    flip_byte(path / "large")
    flip_byte(path / "small")
    assert verify_own_share(path, 0) == ["large is not as it was written"]
    assert verify_own_share(path, 1) == ["small is not as it was written"]
    assert verify_own_share(path, 2) == ["large is not as it was written", "small is not as it was written"]


@pytest.mark.parametrize("content", ["", "[1]", '{"step": 1}', "{"])
def test_a_broken_state_file_is_refused(tmp_path, content):
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(ValueError, match="choose another"):
        store.read_state(tmp_path)
    assert store.problems_of(tmp_path)[0].startswith("state.json ")
    with pytest.raises(ValueError, match=r"state\.json is missing"):
        store.read_state(tmp_path / "absent")


@pytest.mark.parametrize(
    "forged",
    [
        {"best_loss": "low"},
        {"best_step": -1},
        {"guard": []},
        {"guard": {"losses": ["low"]}},
        {"guard": {"rollbacks": 1.5}},
        {"guard": {"in_spike": "no"}},
        {"phases": {}},
        {"phases": [{"first": 0, "changes": {}}]},
        {"phases": [{"first": 4}]},
        {"phases": [{"first": 4, "changes": {"data": {"max_seq_length": "long"}}}]},
    ],
)
def test_what_the_loop_remembers_is_of_its_types(tmp_path, forged):
    path = bare_checkpoint(tmp_path, "step1", 1)
    with changed_state(path) as state:
        state.update(best_loss=0.5, best_step=1, guard={"losses": [1.5, 2], "rollbacks": 1, "in_spike": False})
    assert store.problems_of(path) == []
    with changed_state(path) as state:
        state.update(forged)
    assert store.problems_of(path) == ["state.json says what no save of this project writes"]
