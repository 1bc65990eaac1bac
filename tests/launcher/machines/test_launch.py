"""Which commands `launch` starts, and where."""

import os
import shlex
import socket
import sys
from pathlib import Path

import pytest
from helpers.runs import write_config
from typer.testing import CliRunner

from xformer_train.launcher.commands import app as cli
from xformer_train.launcher.machines import launch

BIN = Path(sys.executable).parent


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


def test_a_second_launch_from_the_first_host_meets_at_another_port(hosts, monkeypatch):
    def ports():
        lines = print_launch("--hostfile", "hosts").output.splitlines()
        return {words[words.index("--master_port") + 1] for words in map(str.split, lines) if "--master_port" in words}

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        monkeypatch.setattr(launch, "DEFAULT_PORT", taken.getsockname()[1])
        assert ports() == {str(launch.DEFAULT_PORT)}  # of the first host, which is another machine
        monkeypatch.setattr(launch, "is_this_machine", lambda host: host == "node1")
        [port] = ports()
        assert port != str(launch.DEFAULT_PORT)


def test_without_a_hostfile_this_machine_starts_as_many_as_are_asked_for(hosts):
    words = shlex.split(print_launch("--processes", "2", "--", "--max_steps", "3").output)
    assert words[words.index("--num_accelerators") + 1] == "2"
    assert words[-5:] == ["xformer_train.launcher", "--config", "run.yaml", "--max_steps", "3"]


def test_gpus_of_this_machine_are_those_it_may_use(hosts, monkeypatch):
    monkeypatch.setattr(launch, "local_devices", lambda: ["2", "5", "7"])
    words = shlex.split(print_launch("--num-gpus", "2").output)
    assert words[words.index("--include") + 1] == "localhost:2,5"
    result = print_launch("--num-gpus", "4")
    assert result.exit_code == 2
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
    assert result.exit_code == 2
    assert "'a;touch b' would not come through --launcher pdsh" in result.output


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--hostfile", "hosts", "--include", "node7"), 2, "host 'node7' is not in the hostfile"),
        (("--hostfile", "none"), 2, "--hostfile=none is not a file"),
        (("--include", "node1"), 2, "give one with --hostfile"),
        (("--hostfile", "hosts", "--launcher", "rsh"), 2, "must be one of ssh, pdsh"),
        (("--hostfile", "hosts", "--launcher", "openmpi", "--num-nodes", "1"), 2, "takes all of the hostfile"),
        (("--processes", "3"), 2, "training.train_batch_size: got 8, must be a multiple of micro_batch_size 2 times 3"),
        (("--hostfile", "hosts", "--exclude", "node1:0"), 2, "times 3 replicas"),
        (("--", "--resume", "step3"), 2, "--resume got 'step3', must be auto"),
        (("--", "--max_stepz", "3"), 2, "No such option: --max-stepz"),
        (("--", "run"), 2, "got 'run' behind --"),
        (("--", "--set", "training.max_stepz=3"), 2, "max_stepz"),
    ],
)
def test_mistakes_are_found_before_anything_is_started(hosts, arguments, status, said):
    result = print_launch(*arguments)
    assert result.exit_code == status, result.output
    assert said in result.output


def test_a_directory_of_another_run_is_found_before_anything_is_started(hosts, monkeypatch):
    """By its processes too; but then --max-restarts would go on with that run."""
    monkeypatch.setattr("xformer_train.launcher.machines.launch.start", lambda *_: pytest.fail("started"))
    (hosts.parent / "runs" / "run" / "checkpoints").mkdir(parents=True)
    result = CliRunner().invoke(cli.app, ["launch", "--config", "run.yaml", "--max-restarts", "3"])
    assert result.exit_code == 1
    assert "runs/run already holds a run; continue it with --resume auto" in result.output


def test_this_machine_is_known_by_its_addresses():
    assert launch.is_this_machine("127.0.0.1")
    assert not launch.is_this_machine("192.0.2.1")  # reserved for documentation
    assert not launch.is_this_machine("no-such-host.invalid")
