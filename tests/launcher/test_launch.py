"""What is started where, and how the end of a run is told from what its processes left."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import losses, write_config
from typer.testing import CliRunner

from xformer_train.launcher import cli, host_process, launch
from xformer_train.launcher.hostfile import choose_slots, read_hostfile
from xformer_train.launcher.rank_status import FOLDER_VARIABLE, RankStatus, recorded
from xformer_train.launcher.supervision import HostCommand, run_hosts

HOSTS = {"node1": (0, 1, 2, 3), "node2": (0, 1), "node3": (0, 1, 2, 3)}
BIN = Path(sys.executable).parent


# Hostfiles


def test_a_hostfile_may_have_comments_and_blank_lines(tmp_path):
    (tmp_path / "hosts").write_text("# ours\n\nnode1 slots=2\n  node2   slots=1  # spare\n")
    assert read_hostfile(tmp_path / "hosts") == {"node1": (0, 1), "node2": (0,)}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("node1\n", "hosts:1: got 'node1', must be a host and its slots"),
        ("node1 slots=two\n", "hosts:1: got 'node1 slots=two', must be a host and its slots"),
        ("node1 slots=1\n\nnode1 slots=1\n", "hosts:3: host node1 stands there twice"),
        ("node1 slots=0\n", "hosts:1: host node1 has no slots"),
        ("-oProxyCommand=x slots=1\n", "must be a name or address"),
        ("localhost slots=1\nnode2 slots=1\n", "localhost means another machine on each host"),
        ("# nothing\n", "holds no host"),
    ],
)
def test_a_bad_hostfile_is_refused_with_its_line(tmp_path, text, said):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ValueError, match="hosts") as error:
        read_hostfile(tmp_path / "hosts")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("choice", "slots"),
    [
        ({}, HOSTS),
        ({"num_nodes": 2}, {"node1": (0, 1, 2, 3), "node2": (0, 1)}),
        ({"num_gpus": 2}, {"node1": (0, 1), "node2": (0, 1), "node3": (0, 1)}),
        ({"include": "node3@node1:2,0"}, {"node1": (0, 2), "node3": (0, 1, 2, 3)}),  # ranks follow the hostfile
        ({"exclude": "node1:0@node2"}, {"node1": (1, 2, 3), "node3": (0, 1, 2, 3)}),
        ({"exclude": "node2:0,1"}, {"node1": (0, 1, 2, 3), "node3": (0, 1, 2, 3)}),
    ],
)
def test_slots_are_chosen_as_deepspeed_chooses_them(choice, slots):
    from deepspeed.launcher.runner import apply_num_nodes_and_gpus, parse_inclusion_exclusion

    assert choose_slots(HOSTS, **choice) == slots
    assert list(choose_slots(HOSTS, **choice)) == list(slots)
    counts = {host: len(own) for host, own in HOSTS.items()}
    theirs = parse_inclusion_exclusion(counts, choice.get("include", ""), choice.get("exclude", ""))
    theirs = apply_num_nodes_and_gpus(theirs, choice.get("num_nodes", -1), choice.get("num_gpus", -1))
    assert {host: tuple(own) for host, own in theirs.items()} == slots


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"include": "node9"}, "--include: host 'node9' is not in the hostfile, which has node1, node2, node3"),
        ({"include": "node2:2"}, "host node2 has slots 0 to 1 in the hostfile, and not slot 2"),
        ({"include": "node1:a"}, "must be a host and perhaps slots"),
        ({"include": "node1@node1:0"}, "host node1 is named twice"),
        ({"exclude": "node1@node2@node3"}, "leaves no slot"),
        ({"include": "node1", "exclude": "node2"}, "exclude each other"),
        ({"include": "node1", "num_nodes": 1}, "do not go with them"),
        ({"num_nodes": 4}, "--num-nodes is 4, and the hostfile has 3 hosts"),
        ({"num_gpus": 3}, "--num-gpus is 3, and host node2 has slots=2"),
    ],
)
def test_a_choice_that_the_hostfile_cannot_give_is_refused(choice, said):
    with pytest.raises(ValueError, match=r"host|exclude|slot") as error:
        choose_slots(HOSTS, **choice)
    assert said in str(error.value)


# Commands


@pytest.fixture
def hosts(tmp_path, monkeypatch):
    """A hostfile of two machines that are not this one, in the current folder, beside a run config."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "local_devices", list)
    monkeypatch.setattr(launch, "_master_address", lambda host: host)
    for name in list(os.environ):
        if name.startswith(launch._FORWARDED_PREFIXES):
            monkeypatch.delenv(name)
    path = tmp_path / "hosts"
    path.write_text("node1 slots=2\nnode2 slots=2\n")
    write_config(tmp_path, training__micro_batch_size=2)
    return path


def print_launch(*arguments):
    return CliRunner().invoke(
        cli.app, ["launch", "--config", "run.yaml", "--print", *arguments], env={"COLUMNS": "200"}
    )


def test_through_ssh_each_host_gets_deepspeeds_launcher_for_itself(hosts, monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("HF_TOKEN", "abc")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("PYTHONPATH", "/a b:$HOME")
    result = print_launch("--hostfile", "hosts", "--", "--set", "data.sources=[{kind: text, path: it's.txt}]")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[-1] == "# passed on too, and not shown: HF_TOKEN"
    assert "abc" not in result.output
    for rank, line in enumerate(lines[:-1]):
        *ssh, host, remote = shlex.split(line)
        assert ssh[0] == "ssh"
        assert "BatchMode=yes" in ssh
        assert host == f"node{rank + 1}"
        words = shlex.split(remote)
        assert words[:4] == ["cd", str(hosts.parent), "&&", "env"]
        assert {"NCCL_DEBUG=WARN", "PYTHONPATH=/a b:$HOME", "DS_ACCELERATOR=cpu"} <= set(words)
        assert "CUDA_VISIBLE_DEVICES=1" not in words
        start = next(i for i, word in enumerate(words) if Path(word).name == "deepspeed")
        assert words[start + 1 :] == [
            *("--quiet", "--no_local_rank", "--hostfile", str(hosts), "--no_ssh", "--node_rank", str(rank)),
            *("--master_addr", "node1", "--master_port", "29500", "--module", "xformer_train.launcher"),
            *("--config", "run.yaml", "--set", "data.sources=[{kind: text, path: it's.txt}]"),
        ]


def test_without_a_hostfile_this_machine_starts_as_many_as_are_asked_for(hosts):
    words = shlex.split(print_launch("--processes", "2", "--", "--max_steps", "3").output)
    assert words[words.index("--num_accelerators") + 1] == "2"
    assert words[-5:] == ["xformer_train.launcher", "--config", "run.yaml", "--max_steps", "3"]


def test_gpus_of_this_machine_are_those_it_may_use(hosts, monkeypatch):
    monkeypatch.setattr(launch, "local_devices", lambda: ["2", "5", "7"])
    words = shlex.split(print_launch("--num-gpus", "2").output)
    assert words[words.index("--include") + 1] == "localhost:2,5"
    result = print_launch("--num-gpus", "4")
    assert result.exit_code == 1
    assert "--num-gpus is 4, and this machine offers 3 GPUs" in result.output


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi", "mpich", "impi", "slurm"])
def test_deepspeeds_own_launchers_get_the_hostfile_and_the_variables_in_a_file(hosts, monkeypatch, launcher):
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    result = print_launch("--hostfile", "hosts", "--launcher", launcher)
    assert result.exit_code == 0, result.output
    command, *variables = result.output.splitlines()
    words = shlex.split(command)
    assert words[words.index("--launcher") + 1] == launcher
    assert words[words.index("--hostfile") + 1] == str(hosts)
    assert "# in the file that DS_ENV_FILE names: NCCL_DEBUG=WARN" in variables
    assert "# in the file that DS_ENV_FILE names: MASTER_ADDR=node1" in variables
    script = Path(words[-3])
    assert script == (BIN / "xformer-train" if launcher == "slurm" else Path("xformer_train.launcher"))


def test_pdsh_is_not_given_what_its_remote_shell_would_change(hosts):
    result = print_launch("--hostfile", "hosts", "--launcher", "pdsh", "--", "--job_name", "a;touch b")
    assert result.exit_code == 1
    assert "'a;touch b' would not come through --launcher pdsh" in result.output


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--hostfile", "hosts", "--include", "node7"), 1, "host 'node7' is not in the hostfile"),
        (("--hostfile", "none"), 1, "--hostfile=none is not a file"),
        (("--include", "node1"), 1, "give one with --hostfile"),
        (("--hostfile", "hosts", "--launcher", "rsh"), 1, "must be one of ssh, pdsh"),
        (("--hostfile", "hosts", "--launcher", "openmpi", "--num-nodes", "1"), 1, "takes all of the hostfile"),
        (("--processes", "3"), 2, "training.train_batch_size: got 8, must be a multiple of micro_batch_size 2 times 3"),
        (("--hostfile", "hosts", "--exclude", "node1:0"), 2, "times 3 replicas"),
        (("--", "--max_stepz", "3"), 2, "No such option: --max-stepz"),
        (("--", "run"), 1, "got 'run' behind --"),
        (("--", "--set", "training.max_stepz=3"), 2, "max_stepz"),
    ],
)
def test_mistakes_are_found_before_anything_is_started(hosts, arguments, status, said):
    result = print_launch(*arguments)
    assert result.exit_code == status, result.output
    assert said in result.output


def test_this_machine_is_known_by_its_addresses():
    assert launch.is_this_machine("127.0.0.1")
    assert not launch.is_this_machine("192.0.2.1")  # reserved for documentation
    assert not launch.is_this_machine("no-such-host.invalid")


# Statuses


def status_of(tmp_path, monkeypatch, block):
    """What `recorded` wrote of a block that leaves by an error."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(BaseException), recorded():  # noqa: B017  the test is about what is written
        block()
    return RankStatus(**json.loads((tmp_path / "rank3.json").read_text()))


def test_a_status_holds_the_traceback_of_a_fault(tmp_path, monkeypatch):
    status = status_of(tmp_path, monkeypatch, lambda: {}["key"])
    assert (status.rank, status.exit_code) == (3, 1)
    assert status.text.endswith("KeyError: 'key'\n")
    assert "in <lambda>" in status.text


def test_a_status_holds_the_message_of_an_error_for_the_user(tmp_path, monkeypatch):
    def block():
        cli.app(["--config", "absent.yaml"])

    status = status_of(tmp_path, monkeypatch, block)
    assert status.exit_code
    assert "absent.yaml" in status.text
    assert "Traceback" not in status.text


def test_an_agreed_exit_code_is_kept(tmp_path, monkeypatch):
    status = status_of(tmp_path, monkeypatch, lambda: sys.exit(75))
    assert (status.exit_code, status.text) == (75, "")


# Supervision, with programs in the place of runs


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


def test_signals_go_to_the_ranks_and_their_end_is_waited_for(tmp_path):
    """The launcher between would end at once and leave them."""
    rank = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (open('saved', 'w'), sys.exit(0)));"
        "open('ready', 'w'); time.sleep(1000)"
    )
    then = f"sys.exit(subprocess.call([sys.executable, '-c', {rank!r}], env={{**os.environ, 'RANK': '0', 'LOCAL_RANK': '0'}}))"
    script = (
        "import sys; from pathlib import Path; from xformer_train.launcher.supervision import *\n"
        f"command = HostCommand([sys.executable, '-c', {'import os, subprocess, sys' + chr(10) + then!r}], {str(tmp_path)!r}, "
        "{}, 1, 'here', remote=False)\n"
        f"sys.exit(run_hosts([command], Path({str(tmp_path)!r}), 1).exit_code)"
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    wait_for(tmp_path / "ready", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM  # no rank reported, so the end is the signal's
    assert (tmp_path / "saved").exists()


def test_the_end_of_stdin_ends_the_command(tmp_path):
    """As when `launch` is killed, or the connection to it is lost."""
    order = {"command": ["sleep", "1000"], "directory": str(tmp_path), "environment": {}, "processes": 1}
    done = subprocess.run(
        [sys.executable, host_process.__file__], input=json.dumps(order) + "\n", text=True, timeout=60, check=False
    )
    assert done.returncode == 128 + signal.SIGTERM


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


# Whole runs


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
    wait_for(tmp_path / "runs" / "run" / "metrics.jsonl", process)
    launchers = [pid for pid in running(str(path)) if "deepspeed.launcher.launch" in command_line(pid)]
    os.kill(launchers[0], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0, err
    assert "left 2 processes running; they are stopped" in err
    assert running(str(path)) == []
    # They were asked to end, so they saved.
    assert [p.name for p in (tmp_path / "runs" / "run" / "checkpoints").glob("step*")] != []


@pytest.mark.slow
def test_torchrun_starts_a_run_too(tmp_path):
    path = write_config(tmp_path, training__max_steps=3)
    place = ["--standalone", "--nproc-per-node", "2"]
    process = start(str(BIN / "torchrun"), *place, "-m", "xformer_train.launcher", "--config", str(path), cwd=tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert sorted(losses(tmp_path / "runs" / "run")) == [1, 2, 3]


def command_line(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def running(text):
    """The processes with this text in their command line."""
    pids = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if text in command_line(pid)]


# Slurm, with programs in the place of its own


@pytest.mark.parametrize(("exit_code", "requeued"), [(0, False), (1, False), (75, True)])
def test_the_slurm_script_queues_a_run_again_that_was_told_to_stop(tmp_path, exit_code, requeued):
    programs = {
        "scontrol": 'if [ "$1" = show ]; then printf "nodeA\\nnodeB\\n"; else echo "$@" > requeued; fi',
        "srun": f'echo "$MASTER_ADDR $MASTER_PORT $OMP_NUM_THREADS" > env; echo "$@" > srun; exit {exit_code}',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[A-B]", "SLURM_JOB_ID": "1234567", "SLURM_CPUS_PER_TASK": "4"}
    script = Path(__file__).parents[2] / "scripts" / "slurm.sbatch"
    done = subprocess.run(
        ["bash", str(script), "--config", "run.yaml", "--seed", "7"],
        check=False,
        cwd=tmp_path,
        env={**os.environ, **slurm, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
    )
    assert done.returncode == exit_code
    assert (tmp_path / "env").read_text() == "nodeA 34567 4\n"
    started = (tmp_path / "srun").read_text()
    assert started == "--cpus-per-task=4 --wait=120 xformer-train --config run.yaml --seed 7 --resume auto\n"
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 1234567\n"
