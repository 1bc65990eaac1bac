"""Starting the processes of a run, alone and under launchers."""

import os
import platform
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.spawn import free_port

from xformer_train.kernels.errors import RefusedError, UserError
from xformer_train.launcher.processes.topology import start_processes, stop_processes

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
LAUNCHER_VARIABLES = [
    *["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"],
    *["TORCHELASTIC_RESTART_COUNT", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"],
]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch
    stop_processes()


def test_one_process_needs_no_launcher_and_no_port():
    topology = start_processes(60)
    assert (topology.rank, topology.world_size, topology.local_rank, topology.is_main) == (0, 1, 0, True)
    assert "MASTER_PORT" not in os.environ
    value = torch.ones(2)
    total = topology.sum(value)
    total += 1  # a copy, also where there is nothing to add
    assert value.tolist() == [1.0, 1.0]
    assert topology.broadcast("x") == "x" and topology.gather("x") == ["x"]
    topology.barrier()


def test_one_process_without_a_launcher_takes_no_port_though_a_shell_names_one(environment):
    """Scripts for schedulers export both, for whatever they start."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        environment.setenv("MASTER_ADDR", "127.0.0.1")
        assert start_processes(60).world_size == 1
        stop_processes()
        environment.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        assert start_processes(60).world_size == 1


def test_a_port_in_use_and_one_that_is_no_number_are_named(environment):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}.items():
            environment.setenv(name, str(value))
        environment.setenv("MASTER_PORT", str(port))
        with pytest.raises(RefusedError, match=rf"cannot meet at MASTER_ADDR 127.0.0.1, MASTER_PORT {port}: .*in use"):
            start_processes(5)
        environment.setenv("MASTER_PORT", "abc")
        with pytest.raises(UserError, match="environment variable MASTER_PORT is 'abc', must be a whole number"):
            start_processes(5)


def test_processes_start_again_after_they_were_stopped():
    start_processes(60)
    with pytest.raises(RuntimeError, match="already up"):
        start_processes(60)
    stop_processes()
    stop_processes()
    assert start_processes(60).world_size == 1


def test_a_batch_job_of_several_tasks_is_still_one_process_where_srun_did_not_start_it(environment):
    environment.setenv("SLURM_PROCID", "0")
    environment.setenv("SLURM_NTASKS", "4")
    assert start_processes(60).world_size == 1


def test_a_first_machine_without_an_address_is_named(environment):
    variables = {"RANK": 1, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": 1}
    for name, value in variables.items():
        environment.setenv(name, str(value))
    with pytest.raises(
        RefusedError, match=r"MASTER_PORT 1: there is no machine of the name no-such-host\.invalid; give"
    ):
        start_processes(2)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4"},
            "MASTER_ADDR is not set, and srun started 4",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2", "MASTER_ADDR": "host"}, "MASTER_PORT is not set, and mpirun started 2"),
        ({"RANK": "0", "LOCAL_RANK": "0"}, "WORLD_SIZE is not set although RANK is"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set although RANK is"),
        (
            {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "host"},
            "MASTER_PORT is not set although RANK is",
        ),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "MASTER_ADDR is not set, and mpiexec started 2"),
        (
            {"PMI_RANK": "2", "MPI_LOCALRANKID": "0", "PMI_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "1"},
            "PMI_RANK is 2, must be below PMI_SIZE, which is 2",
        ),
        (
            {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "1"},
            "RANK is 2, must be below WORLD_SIZE, which is 2; leave both to the launcher",
        ),
        (
            {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": " ", "MASTER_PORT": "1"},
            "MASTER_ADDR is empty",
        ),
        (
            {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "70000"},
            "MASTER_PORT is 70000, must be from 1 to 65535",
        ),
    ],
)
def test_processes_that_could_not_find_each_other_do_not_run_alone(environment, variables, message):
    for name, value in variables.items():
        environment.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        start_processes(60)
    assert not dist.is_initialized()


def test_a_restart_by_torchrun_reads_none_of_the_keys_of_the_attempt_before(environment):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    for name, value in (variables | {"TORCHELASTIC_USE_AGENT_STORE": True}).items():
        environment.setenv(name, str(value))
    for attempt in ("0", "1"):
        environment.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        start_processes(20)
        dist.distributed_c10d._get_default_store().set("mine", attempt)
        stop_processes()
        keys = [key for key in store.list_keys() if key.endswith("mine")]
        assert len(keys) == 1 + int(attempt)
        assert any(key.startswith(f"attempt{attempt}/") for key in keys)


TRAINING = """
from xformer_train.launcher.checkpoint import loading
from xformer_train.launcher.optim import engine
from xformer_train.launcher.processes.topology import quiet, start_processes, stop_processes
quiet(debug=False)
topology = start_processes(60)
from helpers.tiny import tiny_engine, train
for stage, precision in ((0, "bf16"), (3, "fp32")):
    train(tiny_engine(topology, stage, precision), topology, 0, 1)
print(f"own line of {topology.rank} of {topology.world_size}\\n", end="", flush=True)
stop_processes()
"""


def run_training(tmp_path, command, **extra_variables):
    (tmp_path / "training.py").write_text(TRAINING)
    variables = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), **extra_variables}
    for name in [*LAUNCHER_VARIABLES, *({"DS_ACCELERATOR"} - extra_variables.keys())]:
        variables.pop(name, None)
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path / "training.py")],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # What torch says of a machine without a name service is no fault of ours.
    nameless = "The hostname of the client socket cannot be retrieved"
    return sorted(line for line in (done.stdout + done.stderr).splitlines() if nameless not in line)


def test_one_process_prints_its_own_lines_only(tmp_path):
    assert run_training(tmp_path, []) == ["own line of 0 of 1"]


@pytest.mark.slow
def test_two_processes_under_a_quiet_deepspeed_launcher_print_their_own_lines_only(tmp_path):
    command = [
        "-m",
        "deepspeed.launcher.runner",
        "-q",
        "--num_accelerators=2",
        "--no_local_rank",
        f"--master_port={free_port()}",
    ]
    # The launcher's own search for a GPU, before our code runs, prints a line unless the shell names the CPU.
    assert run_training(tmp_path, command, DS_ACCELERATOR="cpu") == ["own line of 0 of 2", "own line of 1 of 2"]


@pytest.mark.slow
def test_work_that_is_under_way_at_the_end_does_not_abort_the_process():
    """With a group that something keeps, as DeepSpeed does at ZeRO stage 3; without a wait, about every third time."""
    program = """
import builtins
import torch
import torch.distributed as dist
from xformer_train.launcher.processes.topology import start_processes, stop_processes

start_processes(60)
builtins.kept = dist.group.WORLD
for _ in range(5000):
    dist.all_reduce(torch.ones(1000), async_op=True)
stop_processes()
"""
    variables = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_used_again_without_asking_the_system():
    """Counted in page faults of 4 KiB over ten equal tensors of 64 MiB, after some with which the heap grows."""
    program = """
import resource
import torch
from xformer_train.launcher.processes.topology import keep_freed_memory

def faults():
    for round in range(15):
        if round == 5:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults())
keep_freed_memory()
print(faults())
"""
    given_back, kept = map(int, subprocess.check_output([sys.executable, "-c", program], text=True).split())
    assert kept < given_back / 4
