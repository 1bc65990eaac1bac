"""What `doctor` makes of the answers of machines, and that it answers itself."""

import json
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.runs import write_config
from helpers.spawn import free_port
from typer.testing import CliRunner

from xformer_train.launcher.commands import app as cli
from xformer_train.launcher.config.schema import RunConfig
from xformer_train.launcher.machines import doctor, doctor_facts, doctor_hosts, doctor_machine
from xformer_train.launcher.machines.launch import LaunchOptions


@pytest.fixture
def facts(tmp_path, monkeypatch):
    """Those of this machine, with nothing in particular in the current folder."""
    monkeypatch.chdir(tmp_path)
    return doctor_facts.facts(doctor_machine.questions(RunConfig(), port=None, names=["127.0.0.1"]))


def told(findings):
    """Levels by name of finding; a name may come twice."""
    return [(finding.what, finding.level) for finding in findings]


def run_doctor(*arguments):
    return CliRunner().invoke(cli.app, ["doctor", *arguments], env={"COLUMNS": "200"})


def test_a_run_can_start_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_config(tmp_path)
    result = run_doctor("--config", str(path), "--quick", "--master-port", str(free_port()))
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert len({line[6:30].index(line[6:30].split()[0]) for line in lines}) == 1, "columns"
    assert {line[:4].strip() for line in lines} <= {"ok", "warn"}
    names = [line[6:30].strip() for line in lines]
    assert {"run config", "python", "packages", "kernels", "compiler", "open files", "output_dir", "port"} <= set(names)
    assert not (tmp_path / "runs").exists()  # a look, nothing more


def test_paths_of_the_run_config_that_are_not_there_fail_and_a_run_directory_in_use_warns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_config(tmp_path, load__path="none")
    (tmp_path / "runs" / "run" / "checkpoints").mkdir(parents=True)
    result = run_doctor("--config", str(path), "--quick", "--master-port", str(free_port()))
    assert result.exit_code == 1
    lines = [line.split(maxsplit=3) for line in result.output.splitlines()]
    assert ["FAIL", "run", "config"] in [line[:3] for line in lines]
    assert "load.path: got 'none', which is not there" in result.output
    [taken] = [line for line in lines if line[:3] == ["warn", "run", "directory"]]
    assert "already holds a run  -> continue it with --resume auto" in taken[3]


def test_the_all_reduce_runs_over_processes_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [finding] = doctor.bandwidth(LaunchOptions(num_gpus=2), None, RunConfig())
    assert finding.level == "ok", finding
    assert "2 processes" in finding.detail


def test_what_cannot_start_is_a_failure_with_a_remedy_and_without_a_traceback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    path = write_config(tmp_path, output_dir=str(tmp_path / "file"), training__train_batch_size=7)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run_doctor("--config", str(path), "--quick", "--master-port", str(port))
    assert result.exit_code == 1
    failures = [line for line in result.output.splitlines() if line.startswith("FAIL")]
    assert all("  -> " in line for line in failures)
    assert [line[6:30].strip() for line in failures] == ["run config", "port"]
    assert "Traceback" not in result.output
    path = write_config(tmp_path, output_dir=str(tmp_path / "file"))
    result = run_doctor("--config", str(path), "--quick")
    assert result.exit_code == 1
    assert f"cannot write: {tmp_path / 'file'} is a file" in result.output


def test_a_check_that_breaks_is_a_failure_and_the_others_go_on(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def broken(*_):
        raise RuntimeError("no such thing")
        yield

    monkeypatch.setattr(doctor, "devices", broken)
    found = list(doctor.examine(LaunchOptions(), None, lambda config: "", quick=True))
    assert ("devices", "FAIL") in told(found)
    assert next(finding.detail for finding in found if finding.what == "devices") == "RuntimeError: no such thing"
    assert told(found)[-1][0] == "port"


# Judgements


def test_folders_must_be_writable_and_have_room(facts):
    def judged(free, fault=None):
        return told(doctor_machine.folders({"folders": {"/a": {"free": free, "fault": fault}}}))

    assert judged(2**40) == [("output_dir", "ok")]
    assert judged(2**32) == [("output_dir", "warn")]
    assert judged(2**20) == [("output_dir", "FAIL")]
    assert judged(0, "/a: Read-only file system") == [("output_dir", "FAIL")]
    assert doctor_facts._folder(Path("not/yet/made"))["fault"] is None
    Path("file").write_text("")
    assert doctor_facts._folder(Path("file/below"))["fault"].endswith("file is a file")
    assert list(Path().iterdir()) == [Path("file")]


def test_low_limits_are_warnings(facts):
    assert ("open files", "warn") in told(doctor_machine.system(facts | {"open_files": 1024}))
    gpu = {"name": "H", "driver": "1", "total": 2**36, "used": 0}
    assert ("shared memory", "warn") in told(
        doctor_machine.system(facts | {"shared_memory": 2**26, "gpus": [gpu, gpu]})
    )


def test_a_package_that_is_missing_or_too_old_is_named_with_what_installs_it(facts, monkeypatch):
    monkeypatch.setattr(
        doctor_machine.metadata, "requires", lambda _: ["nosuchthing>=1", "pytest<0.1", "numpy", "x>1; extra == 'e'"]
    )
    found = [finding for finding in doctor_machine.software(facts) if finding.level == "FAIL"]
    assert told(found) == [("nosuchthing", "FAIL"), ("pytest", "FAIL")]
    assert found[0].remedy == "pip install 'nosuchthing>=1'"


def test_gpus_that_torch_cannot_use_are_a_failure(facts, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    gpu = {"name": "NVIDIA H200", "driver": "570.1", "total": 2**37, "used": 2**36}
    assert told(doctor_machine.devices(facts | {"gpus": [gpu]})) == [("CUDA", "FAIL"), ("GPU 0", "warn")]


def test_a_host_must_be_like_this_machine(facts):
    def judged(changes, skew_s=0.0, slots=(0,), here=facts):
        return told(doctor_hosts.judge_host("h", doctor_hosts.Answer(facts | changes, skew_s=skew_s), here, slots))

    ok = ("h", "ok")
    gpu = {"name": "H", "driver": "1", "total": 2**36, "used": 0}
    shared = {"files": {"/shared/run.yaml": True}, "open_files": 10_000}
    assert judged(shared) == [ok]
    assert judged(shared | {"packages": facts["packages"] | {"torch": "1.0"}}) == [("h", "FAIL")]
    assert judged(shared | {"python": "3.99.0"}) == [("h", "FAIL")]
    assert judged(shared | {"files": {"/shared/run.yaml": False}}) == [ok, ("h files", "FAIL")]
    assert judged(shared, skew_s=-7.0) == [ok, ("h clock", "warn")]
    assert judged(shared | {"gpus": [gpu]}, slots=(0, 1)) == [ok, ("h GPUs", "FAIL")]
    assert judged(shared | {"gpus": [gpu]}, slots=(0,)) == [ok, ("h GPUs", "warn")]  # this machine has none


@pytest.mark.parametrize(
    ("names", "own", "level"),
    [
        (["10.0.0.1"], ["10.0.0.2"], None),
        ([], ["10.0.0.2"], "FAIL"),  # does not know the master
        (["127.0.1.1"], ["10.0.0.2"], "FAIL"),  # takes itself for the master
        (["10.0.0.1"], ["127.0.1.1", "::1"], "FAIL"),  # gloo would offer an address that nobody reaches
        (["10.0.0.1"], [], "FAIL"),
    ],
)
def test_hosts_must_find_each_other(facts, monkeypatch, names, own, level):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    answers = facts | {"names": {"node1": names}, "own_addresses": own}
    judged = told(doctor_hosts.judge_network("node2", answers, ("node1", 29500), is_master=False, several=True))
    assert judged == ([] if level is None else [("node2 network", level)])


def test_a_host_that_does_not_answer_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("hosts").write_text("node1 slots=1\n192.0.2.1 slots=1\n")
    Path("bin").mkdir()
    ssh = Path("bin/ssh")
    ssh.write_text("#!/bin/sh\necho 'Permission denied (publickey).' >&2\nexit 255\n")
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    result = run_doctor("--hostfile", "hosts")
    assert result.exit_code == 1
    lines = result.output.splitlines()
    assert any(line.startswith("FAIL  node1 ") and "Permission denied (publickey)." in line for line in lines)
    assert lines[-1].startswith("warn  all-reduce")


def test_a_bad_hostfile_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("hosts").write_text("node1\n")
    result = run_doctor("--config", str(write_config(tmp_path)), "--hostfile", "hosts")
    assert result.exit_code == 1
    lines = result.output.splitlines()
    assert [line[6:30].strip() for line in lines if line.startswith("FAIL")] == ["hostfile"]
    assert any(line.startswith("ok    run config") for line in lines)
    assert lines[-1].startswith("warn  all-reduce")


def test_only_chosen_hosts_are_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("hosts").write_text(f"192.0.2.1 slots=1\n{platform.node()} slots=4\n")
    monkeypatch.setattr(doctor_hosts, "is_this_machine", lambda host: True)
    result = run_doctor("--hostfile", "hosts", "--include", f"{platform.node()}:0,1", "--quick")
    assert "1 host, slots: 2" in result.output
    assert "192.0.2.1" not in result.output
    result = run_doctor("--hostfile", "hosts", "--exclude", "node7", "--quick")
    assert result.exit_code == 1
    assert "FAIL  hostfile" in result.output and "host 'node7' is not in the hostfile" in result.output


def test_facts_need_nothing_but_python(tmp_path):
    """So that a host without the packages says so."""
    asked = doctor_machine.questions(RunConfig(), port=29500, files=[__file__])
    done = subprocess.run(
        [sys.executable, "-I", "-S", doctor_facts.__file__],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=True,
    )
    answered = json.loads(done.stdout)
    assert answered["files"] == {__file__: True}
    assert answered["packages"]["torch"] is None
