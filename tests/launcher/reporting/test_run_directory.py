"""One run at a time in a run directory."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from contextlib import ExitStack

import pytest
import yaml
from helpers.runs import metrics, write_config

from xformer_train.launcher.config.loading import dump_config, load_config
from xformer_train.launcher.reporting.run_directory import only_run, open_run_directory
from xformer_train.launcher.training.train import run

HOLDER = """
import sys
from pathlib import Path
from xformer_train.launcher.reporting.run_directory import only_run
with only_run(Path(sys.argv[1]) / ".lock"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder():
    """A function that starts a process which is within `only_run` for a folder."""
    processes = []

    def start(folder):
        command = [sys.executable, "-c", HOLDER, str(folder)]
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout.readline() == "held\n"
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_a_run_that_another_one_writes_is_refused_untouched_and_named(holder, tmp_path):
    path = write_config(tmp_path, training__max_steps=2)
    run(load_config(path, (), world_size=1), resume=False)
    folder = tmp_path / "runs/run"
    before = (folder / "config.resolved.yaml").read_text(), metrics(folder)
    process = holder(folder)
    message = rf"{folder} is in use by another run, process {process.pid} on {os.uname().nodename}; wait for its end"
    with pytest.raises(ValueError, match=message):
        run(load_config(path, ["training.max_steps=3"], world_size=1), resume=True)
    assert ((folder / "config.resolved.yaml").read_text(), metrics(folder)) == before


def test_a_killed_process_and_one_that_left_keep_nobody_out(holder, tmp_path):
    process = holder(tmp_path)
    with pytest.raises(ValueError, match="in use"), only_run(tmp_path / ".lock"):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with only_run(tmp_path / ".lock"):
        pass
    assert holder(tmp_path).poll() is None


def test_a_file_system_without_locks_is_told_and_keeps_nobody_out(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with only_run(tmp_path / ".lock"):
        pass
    assert f"{tmp_path}/.lock cannot be locked (No locks available), so nothing keeps" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "a: [", "- 1", "a: &a [*a]", "a: \xff", "a: 1\na: 2"])
def test_a_run_whose_recorded_config_cannot_be_read_is_continued_with_a_warning(tmp_path, capsys, text):
    config = load_config(write_config(tmp_path), (), world_size=1).config
    folder = tmp_path / "runs/run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.resolved.yaml").write_text(text, encoding="latin-1")
    with ExitStack() as held:
        directory = open_run_directory(config, held, resume=True)
    assert directory.changed_keys == ()
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {folder}/config.resolved.yaml") and said.count("\n") == 1
    assert said.endswith("; which keys have changed since the last start is not told\n")


def test_a_key_that_the_run_did_not_know_before_counts_as_its_default(tmp_path):
    config = load_config(write_config(tmp_path), (), world_size=1).config
    folder = tmp_path / "runs/run"
    (folder / "checkpoints").mkdir(parents=True)
    known = yaml.safe_load(dump_config(config))
    for key in ("norm", "gated_mlp", "sliding_window"):
        del known["model"][key]
    (folder / "config.resolved.yaml").write_text(yaml.safe_dump(known))
    now = load_config(write_config(tmp_path, model__sliding_window=8), (), world_size=1).config
    with ExitStack() as held:
        assert open_run_directory(config, held, resume=True).changed_keys == ()
    with ExitStack() as held:
        assert open_run_directory(now, held, resume=True).changed_keys == ("model.sliding_window: null -> 8",)


def test_a_resume_with_a_broken_row_of_metrics_is_refused_before_anything_is_prepared(tmp_path):
    path = write_config(tmp_path, data__sources=[{"kind": "text", "path": "none.txt"}])
    folder = tmp_path / "runs/run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "metrics.jsonl").write_bytes(b'{"step": 1}\n\n\xff\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:3: not a row of metrics"):
        run(load_config(path, (), world_size=1), resume=True)
