"""`xformer-train checkpoints`: what it prints, what it removes, with which exit code it leaves."""

import subprocess
import sys

import pytest
from helpers.checkpoints import bare_checkpoint, flip_byte, list_ids
from typer.testing import CliRunner

from xformer_train.launcher.checkpoint import store
from xformer_train.launcher.commands import app as cli


@pytest.fixture
def run(tmp_path):
    """A run directory with checkpoints of steps 100, 200 and 300."""
    folder = tmp_path / "run" / "checkpoints"
    for step in (100, 200, 300):
        bare_checkpoint(folder, f"step{step}", step, {"weights.pt": "w" * 2000, "tokenizer.json": "{}"})
    (folder / "latest").write_text("step300\n")
    return tmp_path / "run"


def invoke(*arguments):
    return CliRunner().invoke(cli.app, ["checkpoints", *map(str, arguments)], env={"COLUMNS": "200", "TZ": "UTC"})


def test_ls_has_a_line_for_each_and_marks_the_latest_and_the_damaged(run):
    (run / "checkpoints/step100/weights.pt").unlink()
    flip_byte(run / "checkpoints/step200/state.json")
    result = invoke("ls", run)
    assert result.exit_code == 0
    lines = [line.split() for line in result.output.splitlines()]
    assert lines[0] == ["ID", "STEP", "SAMPLES", "SIZE", "SAVED"]
    assert " ".join(lines[1]) == "step200 damaged: state.json is not as it was written"
    assert lines[2][:5] == ["step100", "100", "800", "2.0", "KiB"]
    assert " ".join(lines[2][-4:]) == "damaged: weights.pt is missing"
    assert lines[3][-1] == "latest"


def test_inspect_describes_the_latest_or_the_named_one(run):
    result = invoke("inspect", run)
    assert result.exit_code == 0
    facts = dict(line.split(maxsplit=1) for line in result.output.splitlines())
    assert (facts["step"], facts["samples"], facts["precision"]) == ("300", "2,400", "fp32")
    assert (facts["processes"], facts["weights.pt"]) == ("1 replica x parallel.tensor 1", "2.0 KiB")
    assert "hidden_size 13" in facts["model"]
    named = invoke("inspect", run, "--id", "step1").output
    assert dict(line.split(maxsplit=1) for line in named.splitlines())["step"] == "100"


def test_verify_names_the_damaged_file_and_leaves_with_1(run):
    assert invoke("verify", run).output == "step300: whole, 3 files, 2.0 KiB\n"
    flip_byte(run / "checkpoints/step200/weights.pt")
    assert invoke("verify", run, "--id", "step300").exit_code == 0
    for arguments in (["--all"], ["--id", "step200"]):
        result = invoke("verify", run, *arguments)
        assert result.exit_code == 1
        assert "step200: damaged: weights.pt is not as it was written" in result.output
    result = invoke("verify", run, "--all")
    assert "error: 1 of 3 damaged" in result.output
    assert "step100: whole" in result.output


def test_prune_says_what_it_removes_and_a_dry_run_removes_nothing(run):
    folder = run / "checkpoints"
    result = invoke("prune", run, "--keep-last", 1, "--dry-run")
    assert result.output == "would remove step100\nwould remove step200\n1 left, 3.9 KiB would be freed\n"
    assert list_ids(folder) == ["step100", "step200", "step300"]
    result = invoke("prune", run, "--keep-last", 1, "--keep-every", 200)
    assert result.output == "removed step100\n2 left, 2.0 KiB freed\n"
    assert list_ids(folder) == ["step200", "step300"]


def test_prune_removes_of_a_checkpoint_on_another_disk_the_link_alone(run, tmp_path):
    folder = run / "checkpoints"
    (folder / "step100").rename(tmp_path / "disk")
    (folder / "step100").symlink_to(tmp_path / "disk")
    result = invoke("prune", run, "--keep-last", 1)
    assert result.output == "removed the link step100\nremoved step200\n1 left, 2.0 KiB freed\n"
    assert store.problems_of(tmp_path / "disk") == []
    assert list_ids(folder) == ["step300"]


def test_prune_leaves_the_last_whole_one(run):
    flip_byte(run / "checkpoints/step300/weights.pt")
    result = invoke("prune", run, "--keep-last", 1)
    assert result.output.splitlines()[0] == "removed step100"
    assert list_ids(run / "checkpoints") == ["step200", "step300"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["ls", "absent"], 1, "error: absent holds no checkpoint"),
        (["inspect", "absent"], 1, "error: RUN=absent is not a folder"),
        (["verify", "absent", "--all"], 1, "error: absent holds no checkpoint"),
        (["verify", "absent", "--all", "--id", "a"], 2, "--id and --all exclude each other"),
        (["prune", "absent", "--keep-last", "0"], 2, "Invalid value for '--keep-last'"),
    ],
)
def test_wrong_usage_is_answered_in_a_sentence(arguments, code, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == code
    assert message in result.output
    assert "Traceback" not in result.output


def test_an_id_that_is_not_there_lists_those_that_are(run):
    result = invoke("inspect", run, "--id", "step7")
    assert result.exit_code == 1
    assert "--id=step7 fits no checkpoint" in result.output and "step100, step200, step300" in result.output


def test_no_command_imports_torch(run):
    program = f"""
import sys
from xformer_train.launcher.commands import app
for command in (["ls"], ["inspect"], ["verify", "--all"], ["prune", "--keep-last", "1"]):
    try:
        app.app(["checkpoints", command[0], {str(run)!r}, *command[1:]])
    except SystemExit as ended:
        assert not ended.code
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
