import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from helpers.checkpoints import bare_checkpoint
from helpers.command_line import MINIMAL, invoke
from helpers.permissions import bound_by_permissions
from typer.testing import CliRunner

from xformer_train.kernels.errors import RefusedError, UserError
from xformer_train.launcher.commands import app as cli
from xformer_train.launcher.commands import train as train_cli
from xformer_train.launcher.config.flags import FLAGS
from xformer_train.launcher.config.loading import load_config
from xformer_train.launcher.processes.rank_status import REQUEUE, Exit

FAULT = "this is a fault of xformer-train; please report it with the traceback above"


def leaving(monkeypatch, capsys, *arguments):
    """The exit status and stderr of the console script."""
    monkeypatch.setattr(sys, "argv", ["xformer-train", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code, capsys.readouterr().err


def failing_run(error):
    def run(loaded, *, resume):
        raise error

    return run


def test_a_config_alone_trains(runs):
    result = invoke("--config", "run.yaml")
    assert result.exit_code == 0, result.output
    [(loaded, resume, debug)] = runs
    assert loaded.config == load_config("run.yaml").config
    assert (resume, debug) == (False, False)
    assert result.stdout == "run run: loading PyTorch and DeepSpeed\n"  # at once, before seconds of imports


@pytest.mark.parametrize("option", ["--config", "--config-file", "--config_file", "--cf"])
def test_the_config_has_three_names(runs, option):
    assert invoke(option, "run.yaml", "--resume", "auto", "--debug").exit_code == 0
    [(_, resume, debug)] = runs
    assert (resume, debug) == (True, True)


FLAG_VALUES = {
    "--max_seq_length": ("256", 256),
    "--print_steps": ("7", 7),
    "--max_steps": ("3", 3),
    "--max_tokens": ("4096", 4096),
    "--max_hours": ("1.5", 1.5),
    "--seed": ("0", 0),
    "--output_dir": ("out", "out"),
    "--job_name": ("2024", "2024"),
    "--lr_schedule": ("EP", "EP"),
    "--lr_offset": ("0.5", 0.5),
    "--load_training_checkpoint": ("runs/a", "runs/a"),
    "--load_checkpoint_id": ("step3", "step3"),
    "--deepspeed_config": ("ds.json", {"prescale_gradients": False}),
    "--rewarmup": (None, True),
    "--decay": (None, True),
    "--attention_dropout_checkpoint": (None, True),
    "--gelu_checkpoint": (None, True),
    "--normalize_invertible": (None, True),
    "--stochastic_mode": (None, True),
}


@pytest.mark.parametrize("hyphens", [False, True])
@pytest.mark.parametrize("flag", [flag for flag in FLAGS if flag.key], ids=lambda flag: flag.names[0])
def test_each_flag_sets_its_key_in_both_spellings_and_by_each_name(runs, flag, hyphens):
    Path("ds.json").write_text('{"prescale_gradients": false}')
    text, expected = FLAG_VALUES[flag.names[0]]
    for name in flag.names:
        option = name.replace("_", "-") if hyphens else name
        needed = ["--load_training_checkpoint", "x"] if flag.key in ("load.id", "load.rewarmup", "load.decay") else []
        needed += ["--lr_schedule", "wsd"] if flag.key == "load.decay" else []
        result = invoke("--config", "run.yaml", option, *([text] if text else []), *needed)
        assert result.exit_code == 0, result.output
        loaded = runs.pop()[0]
        value = loaded.config.model_dump()
        for part in flag.key.split("."):
            value = value[part]
        assert value == expected
        if flag.key != "deepspeed":
            assert loaded.origins[flag.key] == flag.names[0]


def test_flags_without_effect_are_accepted_anywhere(runs):
    plain = load_config("run.yaml").config
    result = invoke("--local_rank=1", "--deepspeed", "--config", "run.yaml", "--deepspeed_transformer_kernel")
    assert result.exit_code == 0, result.output
    assert runs[0][0].config == plain
    assert invoke("--config", "run.yaml", "--local-rank", "0").exit_code == 0


def test_an_offset_of_zero_is_set_and_not_taken_for_absent(runs):
    Path("run.yaml").write_text(MINIMAL + "schedule: {lr_offset: 0.5}\n")
    assert invoke("--config", "run.yaml", "--lr_offset", "0.0").exit_code == 0
    assert runs[0][0].config.schedule.lr_offset == 0.0


def test_a_flag_wins_over_set_and_set_over_the_file(runs):
    assert (
        invoke(
            "--config", "run.yaml", "--set", "training.max_steps=20", "--set", "seed=3", "--max_steps", "30"
        ).exit_code
        == 0
    )
    config = runs[0][0].config
    assert (config.training.max_steps, config.seed) == (30, 3)


def test_config_problems_go_to_stderr_with_status_2(runs):
    Path("run.yaml").write_text("optimizer:\n  max_coef: 1\n  lr: x\n" + MINIMAL)
    result = invoke("--config", "run.yaml")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "run.yaml:2: optimizer.max_coef: unknown key (did you mean max_coeff?)",
        "run.yaml:3: optimizer.lr: got 'x' (text), must be a number",
    ]
    assert runs == []


def test_only_the_first_process_prints_config_problems(runs, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, printed in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        result = invoke("--config", "none.yaml")
        assert result.exit_code == 2
        assert bool(result.output) is printed


@pytest.mark.parametrize("error", [UserError("the corpus is empty"), RefusedError("no space left on device")])
def test_an_error_of_the_run_is_one_line_with_status_1(runs, monkeypatch, error):
    sys.modules["xformer_train.launcher.training.train"].run = failing_run(error)
    result = invoke("--config", "run.yaml")
    assert result.exit_code == 1
    assert result.stderr == f"error: {error}\n"
    with_debug = invoke("--config", "run.yaml", "--debug")
    assert with_debug.exit_code == 1
    assert "Traceback" in with_debug.stderr
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert invoke("--config", "run.yaml").stderr == f"error (rank 3): {error}\n"


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("config check --config run.yaml --set load.path=shut/run", "shut/run"),
        ("config check --config run.yaml --set tokenizer.path=shut/tokenizer.json", "shut/tokenizer.json"),
        ("config check --config run.yaml --set 'data.sources={kind: text, path: shut/a.txt}'", "shut/a.txt"),
        ("config check --config run.yaml --deepspeed_config shut/ds.json", "shut/ds.json"),
        ("config check --config shut/run.yaml", "shut/run.yaml"),
        ("launch --print --config run.yaml --hostfile shut/hosts", "shut/hosts"),
        ("checkpoints ls shut/run", "shut/run"),
    ],
)
def test_a_path_that_this_user_may_not_see_is_one_line_with_a_remedy(runs, command, names):
    Path("shut").mkdir(mode=0o000)
    with bound_by_permissions():
        result = invoke(*shlex.split(command))
    assert result.exit_code in (1, 2)
    (line,) = result.stderr.splitlines()
    assert names in line and "Permission denied; correct its permissions" in line
    assert "Errno" not in line


@pytest.mark.parametrize("error", [ValueError("a defect"), OSError("a defect"), KeyError("a defect")])
@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_any_other_error_of_the_run_is_a_fault_of_ours_and_shows_its_traceback(runs, error, debug, monkeypatch, capsys):
    sys.modules["xformer_train.launcher.training.train"].run = failing_run(error)
    status, text = leaving(monkeypatch, capsys, "--config", "run.yaml", *debug)
    assert status == 1
    assert text.startswith("Traceback") and text.count("Traceback") == 1
    assert text.splitlines()[-2] == f"{type(error).__name__}: {error}"
    assert text.splitlines()[-1] == f"error: {FAULT}"


def test_a_fault_in_a_check_of_a_run_config_is_not_told_as_the_users_mistake(runs, monkeypatch, capsys):
    def broken(*args):
        raise ValueError("a defect")

    monkeypatch.setattr("xformer_train.launcher.config.checks.solve_batch", broken)
    status, text = leaving(monkeypatch, capsys, "config", "check", "--config", "run.yaml")
    assert status == 1
    assert "Traceback" in text and "in broken" in text
    assert text.splitlines()[-1] == f"error: {FAULT}"


def test_the_exit_carries_the_message_that_was_printed(runs, monkeypatch, capsys):
    sys.modules["xformer_train.launcher.training.train"].run = failing_run(UserError("the corpus is empty"))
    monkeypatch.setattr(sys, "argv", ["xformer-train", "--config", "run.yaml"])
    with pytest.raises(Exit) as left:
        cli.main()
    assert (left.value.code, left.value.message) == (1, "error: the corpus is empty")
    assert capsys.readouterr().err == "error: the corpus is empty\n"


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([], "error: no run config is given; use --config FILE, or --help\n"),
        (["--config", "run.yaml", "--resume", "step3"], "error: --resume got 'step3', must be auto; "),
        (["--config", "run.yaml", "config", "show"], "error: options of config stand behind it"),
        (["--seed", "3", "config", "schema"], "error: options of config stand behind it"),
        (["config", "show"], "error: no run config is given"),
    ],
)
def test_a_wrong_command_line_is_explained_with_status_2(runs, arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(message)
    assert runs == []


@pytest.mark.parametrize("arguments", [["--max_step", "3"], ["--max_steps", "x"], ["surplus"]])
def test_unknown_options_and_wrong_types_have_status_2(runs, arguments):
    assert invoke("--config", "run.yaml", *arguments).exit_code == 2
    assert runs == []


def test_a_wrong_world_size_is_named(runs, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    result = invoke("--config", "run.yaml")
    assert result.exit_code == 1
    assert "WORLD_SIZE is 'two'" in result.stderr


@pytest.mark.parametrize(
    "arguments,hint",
    [
        (["train", "--config", "run.yaml"], "training is the command without a name, xformer-train --config FILE"),
        (["run.yaml"], "a run config is given with --config run.yaml"),
        (["--config", "run.yaml", "more.json"], "a run config is given with --config more.json"),
        (["config", "check", "run.yaml"], "a run config is given with --config run.yaml"),
        (["launch", "run.yaml"], "run config is given with --config run.yaml"),
        (["launch", "--processes", "2", "run.json"], "run config is given with --config run.json"),
        (["doctor", "run.yml"], "a run config is given with --config run.yml"),
        (
            ["launch", "--config", "run.yaml", "--max_steps", "4"],
            "after --, as in: launch --config FILE -- --max-steps",
        ),
        (
            ["launch", "--config", "run.yaml", "--resume", "auto"],
            "write it after --, as in: launch --config FILE -- --resume",
        ),
        (["launch", "--config", "run.yaml", "--set=seed=1"], "write it after --, as in: launch --config FILE -- --set"),
    ],
)
def test_a_word_in_the_wrong_place_is_told_with_what_to_write(runs, arguments, hint):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert hint in " ".join(result.stderr.replace("│", " ").split())
    assert "max-restarts" not in result.stderr
    assert runs == []


def test_the_versions_are_shown():
    result = invoke("--version")
    assert result.exit_code == 0
    assert re.fullmatch(r"xformer-train \S+, torch \S+, deepspeed \S+\n", result.stdout)


def test_a_tilde_in_a_path_of_the_command_line_is_the_home_folder(runs, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert invoke("--config=~/run.yaml").exit_code == 0
    assert "no such file or folder" not in invoke("checkpoints", "ls", "~").stderr
    assert "Could not determine home" in invoke("--config=~no-such-user/run.yaml").stderr.replace("│", "").replace(
        "\n", " "
    )


def test_help_lists_the_flags_with_the_keys_they_set():
    text = invoke("--help").output
    for flag in FLAGS:
        for name in flag.names:
            assert name in text
        if flag.key:
            assert f"({flag.key})" in text.replace("\n", " ")
    own, flags = text.index("--config"), text.index(train_cli.FLAGS_PANEL)
    assert own < flags < text.index("--max_seq_length")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["launch", "--help"],
        ["config", "show", "--config", "run.yaml"],
        ["config", "check", "--config", "run.yaml"],
        ["config", "schema"],
        ["checkpoints", "ls", "run"],
    ],
    ids=" ".join,
)
def test_what_answers_at_once_imports_no_heavy_module(tmp_path, arguments):
    (tmp_path / "run.yaml").write_text(MINIMAL)
    bare_checkpoint(tmp_path / "run" / "checkpoints", "step1", 1, {"weights.pt": "w"})
    code = (
        "import sys\n"
        "from xformer_train.launcher.commands.app import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print(*sys.modules)"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.count("\n") > 1
    heavy = {
        "torch",
        "deepspeed",
        "datasets",
        "tokenizers",
        "numpy",
        *(["pydantic"] if arguments == ["--help"] else []),
    }
    assert heavy.isdisjoint(done.stdout.splitlines()[-1].split())


def commands(command, path=()):
    """All commands with the words that call them."""
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*path, name))


def test_no_help_cuts_an_option_at_80_columns():
    for path, command in commands(typer.main.get_command(cli.app)):
        text = CliRunner().invoke(cli.app, [*path, "--help"], env={"COLUMNS": "80"}).output
        words = set(re.findall(r"--[\w-]+(?!…|[\w-])", text))
        for parameter in command.params:
            options = {name for name in parameter.opts if name.startswith("--")}
            assert options <= words, f"{path}: {options - words} is cut"


@pytest.mark.parametrize("module", ["xformer_train", "xformer_train.launcher"])
def test_the_module_is_the_console_script(tmp_path, module):
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", module, "--local_rank=0", "--cf", "none.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("none.yaml: no such file")
    assert done.stdout == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_scheduler_may_stop_a_run_that_is_still_importing(tmp_path, number):
    code = (
        "import sys, time, types\n"
        "def quiet(debug): print('importing', flush=True); time.sleep(1000)\n"
        "topology = types.ModuleType('topology'); topology.quiet = quiet\n"
        "sys.modules['xformer_train.launcher.processes.topology'] = topology\n"
        "from xformer_train.launcher.commands.app import main\n"
        "main()"
    )
    (tmp_path / "run.yaml").write_text(MINIMAL)
    command = [sys.executable, "-c", code, "--config", "run.yaml"]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "run run: loading PyTorch and DeepSpeed\n"
    assert process.stdout.readline() == "importing\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == REQUEUE
    assert err == f"{number.name}: stopped before the first step\n"


def test_library_warnings_are_silent_unless_asked_for(monkeypatch):
    code = (
        "import sys, types, warnings\n"
        "from xformer_train.launcher.processes.console import quieten_libraries\n"
        "quieten_libraries()\n"
        "for name in ('torch.x', 'torchlike', 'mine'):\n"
        "    warnings.warn_explicit(name, FutureWarning, 'f.py', 1, module=name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch.x" not in done.stderr
    assert "torchlike" in done.stderr
    assert "mine" in done.stderr
