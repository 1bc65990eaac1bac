import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from xformer_train.recipes.data.cache import cache_folder, open_or_build, read_array, whole_folder, write_atomically


def build_one(partial):
    (partial / "numbers").write_bytes(b"\x01\x00\x02\x00")
    return {"count": 2}


def test_what_was_built_is_found_again(tmp_path):
    folder = tmp_path / "cache" / "tokens" / "key"
    assert open_or_build(folder, build_one, pytest.fail) == {"count": 2}
    assert open_or_build(folder, lambda _: pytest.fail("built again"), pytest.fail) == {"count": 2}
    assert read_array(folder / "numbers", "<u2").tolist() == [1, 2]


BUILDER = """
import sys
from pathlib import Path
from xformer_train.recipes.data.cache import open_or_build
def slow(partial):
    (partial / "half").write_bytes(b"12")
    print("building", flush=True)
    sys.stdin.readline()
    return {"by": "the first"}
open_or_build(Path(sys.argv[1]), slow, print)
"""


@pytest.fixture
def builder(tmp_path):
    """A process that is building the folder `key`, until it is given a line or killed."""
    command = [sys.executable, "-c", BUILDER, str(tmp_path / "key")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "building\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_waits_for_the_first_and_says_so(tmp_path, builder):
    told = []

    def tell(text):
        told.append(text)
        builder.stdin.write("go on\n")
        builder.stdin.flush()

    assert open_or_build(tmp_path / "key", lambda _: pytest.fail("built twice"), tell) == {"by": "the first"}
    assert told == ["waiting for another process that prepares the same data"]


def test_what_a_killed_process_began_is_built_anew(tmp_path, builder):
    facts = open_or_build(tmp_path / "key", build_one, lambda _: builder.send_signal(signal.SIGKILL))
    assert facts == {"count": 2}
    assert not (tmp_path / "key" / "half").exists()


def test_the_first_of_two_machines_to_finish_wins(tmp_path):
    folder = tmp_path / "key"

    def overtaken(partial):
        folder.mkdir()
        (folder / "manifest.json").write_text('{"facts": {"by": "the other"}, "bytes": {}}')
        return build_one(partial)

    assert open_or_build(folder, overtaken, pytest.fail) == {"by": "the other"}
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["key"]


@pytest.mark.parametrize("way", ["prepared", "exported", "small"])
def test_files_are_on_the_disk_before_they_get_their_names(tmp_path, monkeypatch, way):
    """A power cut leaves zeros of the right size in a file that was renamed before it was flushed."""
    done, fsync = [], os.fsync

    def flush(descriptor):
        done.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    def noting(function):
        def rename(path, target):
            done.append("renamed")
            return function(path, target)

        return rename

    monkeypatch.setattr(os, "fsync", flush)
    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, noting(getattr(Path, name)))
    written = []

    def build(folder):
        for name in ("a.tokens", "b.tokens"):
            (folder / name).write_bytes(b"1234")
        written.extend([*folder.iterdir(), folder])
        return {}

    if way == "prepared":
        open_or_build(tmp_path / "cache/data/x", build, [].append)
        written.append(written[-1] / "manifest.json")
    elif way == "exported":
        with whole_folder(tmp_path / "x") as folder:
            build(folder)
    else:
        write_atomically(tmp_path / "cache/data/x", "text")
    before = done[: done.index("renamed")]
    assert set(written) <= set(before) and before


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    cache = tmp_path / "file"
    cache.touch()
    message = rf"^data\.cache_dir={cache}: .*Not a directory.*; name a folder that can be written$"
    with pytest.raises(ValueError, match=message):
        open_or_build(cache / "tokens" / "key", build_one, pytest.fail)
    with pytest.raises(ValueError, match=message):
        write_atomically(cache / "file_hashes" / "key", "text")


def test_a_lock_that_the_file_system_does_not_have_names_the_cache(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with pytest.raises(ValueError, match=rf"^data\.cache_dir={tmp_path}: .*No locks available; name a folder"):
        open_or_build(tmp_path / "tokens" / "key", build_one, pytest.fail)


def test_a_user_without_a_home_folder_is_told_what_to_set(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", homeless)
    with pytest.raises(ValueError, match=r"^data\.cache_dir=None: .*home directory.*; name a folder"):
        cache_folder(None)


def test_an_empty_array_can_be_read(tmp_path):
    (tmp_path / "none").touch()
    assert read_array(tmp_path / "none", "<i8").tolist() == []


def test_the_cache_is_where_the_user_says(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder(None) == tmp_path / ".cache" / "xformer-train"
    assert cache_folder("~/mine") == tmp_path / "mine"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder(None) == tmp_path / "x" / "xformer-train"


def test_small_files_are_replaced_whole(tmp_path):
    write_atomically(tmp_path / "new" / "file", "one")
    write_atomically(tmp_path / "new" / "file", "two")
    assert [path.read_text() for path in (tmp_path / "new").iterdir()] == ["two"]


def test_a_file_that_was_written_again_is_compared_with_what_was_prepared(tmp_path):
    folder, told = tmp_path / "cache" / "tokens" / "key", []
    open_or_build(folder, build_one, pytest.fail)
    os.utime(folder / "numbers", ns=(1, 1))
    assert open_or_build(folder, build_one, told.append) == {"count": 2}
    assert len(told) == 1 and "numbers has another time than when it was written" in told[0]
    open_or_build(folder, build_one, pytest.fail)  # it is not compared again
    (folder / "numbers").write_bytes(bytes(4))
    with pytest.raises(ValueError, match=r"numbers does not hold what was written there; remove .* prepared again"):
        open_or_build(folder, build_one, told.append)


@pytest.mark.parametrize("umask", [0o027, 0o002, 0o077])
def test_a_whole_folder_has_the_mode_that_the_umask_gives(tmp_path, umask):
    before = os.umask(umask)
    try:
        with whole_folder(tmp_path / "new") as partial:
            (partial / "file").write_text("")
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o777 & ~umask
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
