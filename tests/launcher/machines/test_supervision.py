"""How the end of a run is told from what its processes left, and that none of them is left, whatever ends first."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.runs import write_config
from helpers.spawn import PATIENCE_S

from xformer_train.launcher.machines import host_process
from xformer_train.launcher.machines.supervision import HostCommand, run_hosts
from xformer_train.launcher.processes.rank_status import FOLDER_VARIABLE, REQUEUE

# With programs in the place of runs


def program(folder, *ranks, exit_code=0, then="pass"):
    """A command that reports a status for each (rank, exit code, seconds, text), does `then`, and ends."""
    text = f"import json, os, subprocess, sys, time\nfolder = os.environ[{FOLDER_VARIABLE!r}]\n"
    for rank, code, time_s, said in ranks:
        status = {"rank": rank, "host": "here", "exit_code": code, "time_s": time_s, "text": said}
        text += f"open(f'{{folder}}/rank{rank}.json', 'w').write({json.dumps(status)!r})\n"
    return HostCommand(
        [sys.executable, "-c", f"{text}{then}\nsys.exit({exit_code})"], str(folder), {}, 1, "this machine", remote=False
    )


def ended(tmp_path, *commands, world_size=2):
    folder = tmp_path / "status"
    folder.mkdir()
    return run_hosts(commands, folder, world_size)


def test_a_run_is_well_only_if_every_rank_says_so(tmp_path):
    assert ended(tmp_path, program(tmp_path, (0, 0, 1.0, ""), (1, 0, 1.0, ""))).exit_code == 0


def test_a_launcher_that_exits_with_0_is_not_believed(tmp_path):
    outcome = ended(tmp_path, program(tmp_path, (0, 0, 1.0, "")))
    assert outcome.exit_code == 1
    assert outcome.text.startswith("rank 1 ended without a word")


def test_the_first_failure_comes_last_with_its_code(tmp_path):
    ranks = [(0, 1, 5.0, "peer is gone"), (1, 3, 4.0, "Traceback\nKeyError: 1\n"), (2, 1, 3.0, "")]
    outcome = ended(tmp_path, program(tmp_path, *ranks, exit_code=1), world_size=3)
    assert outcome.exit_code == 3
    assert outcome.text.splitlines() == [
        "this machine: the launcher ended with exit code 1",
        "ranks 0, 2 failed after rank 1",
        "rank 1 on here ended with exit code 3",
        "Traceback",
        "KeyError: 1",
    ]


def test_an_end_that_all_agree_on_keeps_its_code(tmp_path):
    outcome = ended(tmp_path, program(tmp_path, (0, 75, 1.0, ""), (1, 75, 2.0, ""), exit_code=75))
    assert (outcome.exit_code, outcome.text) == (75, "all processes ended with exit code 75")


def test_a_killed_launcher_is_named_with_the_signal(tmp_path):
    outcome = ended(tmp_path, program(tmp_path, then="os.kill(os.getpid(), 9)"))
    assert outcome.exit_code == 137
    assert "exit code 137 (SIGKILL)" in outcome.text


def test_no_process_is_left_when_the_launcher_leaves_some(tmp_path, capfd):
    orphan = "child = subprocess.Popen(['sleep', '1000']); open('pid', 'w').write(str(child.pid))"
    ranks = [(0, 0, 1.0, ""), (1, 0, 1.0, "")]
    outcome = ended(tmp_path, program(tmp_path, *ranks, then=orphan))
    assert outcome.exit_code == 1
    assert "left 1 processes running" in capfd.readouterr().err
    assert command_line((tmp_path / "pid").read_text()) == ""  # gone, or a zombie that nobody has cleared away yet


RANK = (
    "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (open('saved', 'w'), sys.exit(0)));"
    "open('ready', 'w'); time.sleep(1000)"
)
LAUNCHER = (
    "import os, subprocess, sys\n"
    f"sys.exit(subprocess.call([sys.executable, '-c', {RANK!r}], env={{**os.environ, 'RANK': '0', 'LOCAL_RANK': '0'}}))"
)


def launched(tmp_path, launcher, ignored=None, **fields):
    """A process that supervises `launcher`, a program, as `launch` would; once the program has written `ready`."""
    script = (
        "import sys; from pathlib import Path; from xformer_train.launcher.machines.supervision import *\n"
        f"command = HostCommand([sys.executable, '-c', {launcher!r}], {str(tmp_path)!r}, {{}}, 1, 'here', False, **{fields})\n"
        f"sys.exit(run_hosts([command], Path({str(tmp_path)!r}), 1).exit_code)"
    )
    before = None if ignored is None else signal.signal(ignored, signal.SIG_IGN)  # which the process inherits
    try:
        process = subprocess.Popen([sys.executable, "-c", script])
    finally:
        if ignored is not None:
            signal.signal(ignored, before)
    wait_until((tmp_path / "ready").exists, process)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2])
def test_signals_go_to_the_ranks_and_their_end_is_waited_for(tmp_path, number):
    """The launcher between would end at once and leave them."""
    process = launched(tmp_path, LAUNCHER)
    process.send_signal(number)
    assert process.wait(PATIENCE_S) == REQUEUE  # though no rank reported
    assert (tmp_path / "saved").exists()


def test_ranks_are_told_to_end_when_the_process_that_minds_them_is_killed(tmp_path):
    process = launched(tmp_path, LAUNCHER)
    [minder] = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    os.kill(minder, signal.SIGKILL)
    # Not before the ranks have ended, as a restart may follow.
    assert process.wait(PATIENCE_S) == 128 + signal.SIGKILL
    assert (tmp_path / "saved").exists()
    assert running(str(tmp_path)) == []


def test_a_hang_up_ends_the_run_but_not_under_nohup(tmp_path):
    process = launched(tmp_path, LAUNCHER, ignored=signal.SIGHUP)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGINT)  # handled after it; ends the rank without a word
    assert process.wait(PATIENCE_S) == 128 + signal.SIGINT
    assert not (tmp_path / "saved").exists()


def test_pdsh_gets_the_one_signal_it_passes_on_and_its_ranks_are_waited_for(tmp_path):
    """DeepSpeed's pdsh runner tells the hosts by another pdsh, and ends before the processes there."""
    status = {"rank": 0, "host": "far", "exit_code": 75, "time_s": 1.0, "text": ""}
    saving = f"import time; time.sleep(1); open('rank0.json', 'w').write({json.dumps(status)!r})"
    runner = (
        "import signal, subprocess, sys, time\n"
        "def tell(*_):\n"
        f"    subprocess.Popen([sys.executable, '-c', {saving!r}], start_new_session=True)\n"
        "    sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, tell); open('ready', 'w'); time.sleep(1000)"
    )
    process = launched(tmp_path, runner, through_pdsh=True)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(PATIENCE_S) == REQUEUE


def host_process_ended(command, directory):
    """What a host's process did whose stdin ends behind the order to start the command."""
    order = {"command": command, "directory": str(directory), "environment": {}, "processes": 1}
    return subprocess.run(
        [sys.executable, host_process.__file__],
        input=json.dumps(order) + "\n",
        text=True,
        capture_output=True,
        timeout=PATIENCE_S,
        check=False,
    )


@pytest.mark.parametrize(("command", "directory"), [("sleep", "nowhere"), ("nothing", ".")])
def test_a_host_without_the_working_folder_or_the_packages_is_named(tmp_path, command, directory):
    done = host_process_ended([command], tmp_path / directory)
    assert done.returncode == 1
    missing = tmp_path / directory if directory == "nowhere" else command
    assert done.stderr.startswith(f"cannot start a run on {platform.node()}: {missing}: No such file or directory; ")
    assert done.stderr.count("\n") == 1


def test_the_end_of_stdin_ends_the_command(tmp_path):
    """As when `launch` is killed, or the connection to it is lost."""
    done = host_process_ended(["sleep", "1000"], tmp_path)
    assert done.returncode == 128 + signal.SIGTERM


def wait_until(holds, process):
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


# A whole run


def start(*words, **options):
    return subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


@pytest.mark.slow
def test_a_run_whose_launcher_is_killed_fails_and_leaves_nothing(tmp_path):
    """DeepSpeed's own command would exit with 0 and leave both processes training."""
    path = write_config(tmp_path, training__max_steps=100_000, schedule__type="constant", schedule__total_steps=None)
    process = start(sys.executable, "-m", "xformer_train.launcher", "launch", "--config", str(path), "--processes", "2")
    metrics = tmp_path / "runs" / "run" / "metrics.jsonl"
    # Before the first step there would be nothing to save.
    wait_until(lambda: metrics.exists() and metrics.stat().st_size, process)
    launchers = [pid for pid in running(str(path)) if "deepspeed.launcher.launch" in command_line(pid)]
    os.kill(launchers[0], signal.SIGKILL)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode != 0, err
    assert "left 2 processes running; they are stopped" in err
    assert running(str(path)) == []
    # They were asked to end, so they saved.
    assert [p.name for p in (tmp_path / "runs" / "run" / "checkpoints").glob("step*")] != []


def command_line(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def running(text):
    """The processes with this text in their command line."""
    pids = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if text in command_line(pid)]
