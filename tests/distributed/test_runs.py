"""Whole runs in two processes, and what signals do to a run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed.workers.runs import runs_worker
from helpers.runs import BERT, PACKED, losses, metrics, weights, write_config
from helpers.spawn import PATIENCE_S, free_port, run_processes

from xformer_train.launcher.checkpoint import store

LAUNCHER = Path(sys.executable).with_name("deepspeed")
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def train(*arguments, processes=1):
    """The finished process of a run that was started as a user starts it, which takes seconds."""
    command = [sys.executable, "-m", "xformer_train.launcher", *arguments]
    if processes > 1:
        start = [LAUNCHER, "--num_accelerators", str(processes), "--master_port", str(free_port())]
        command = [*start, "--module", "xformer_train.launcher", *arguments]
    environment = {**ONE_THREAD, "PATH": f"{LAUNCHER.parent}:{os.environ['PATH']}"}
    return subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=PATIENCE_S, env=environment, cwd="/"
    )


def train_quickly(path, *runs):
    """Runs of one process, one after the other; runs: --set arguments, and whether to resume."""
    (printed,) = run_processes(runs_worker, 1, 1, [(path, sets, resume, free_port()) for sets, resume in runs])
    assert all("finished" in text for text in printed), printed


@pytest.mark.parametrize("base", [BERT, PACKED], ids=["padded", "packed"])
def test_two_processes_train_as_one_with_the_whole_batch(base, tmp_path):
    """The losses of all steps agree, and each loss depends on the gradients of the steps before it."""
    path = write_config(
        tmp_path,
        base,
        model__hidden_dropout_prob=0.0,
        model__attention_probs_dropout_prob=0.0,
        training__micro_batch_size=None,
        data__validation_fraction=0.2,
        optimizer__lr=0.01,
    )
    train_quickly(path, (["name=one"], False))
    two = train("--config", str(path), "--job_name", "two", processes=2)
    assert two.returncode == 0, two.stderr
    root = tmp_path / "runs"
    # fp32 sums in another order, fed back through 12 Adam steps
    assert losses(root / "one") == pytest.approx(losses(root / "two"), rel=2e-5)
    norms = [[row["grad_norm"] for row in metrics(root / name) if "grad_norm" in row] for name in ("one", "two")]
    assert norms[0] == pytest.approx(norms[1], rel=2e-4)
    assert metrics(root / "one")[-1]["val_loss"] == pytest.approx(metrics(root / "two")[-1]["val_loss"], rel=2e-5)
    assert "= 4 per process x 2 processes x 1 micro-batch" in two.stdout
    assert two.stdout.count("held-out loss") == 1  # one process speaks

    # a checkpoint of ZeRO stage 0 goes on with another number of processes
    train_quickly(path, (["name=two", "training.max_steps=14", "schedule.total_steps=null"], True))
    assert sorted(losses(root / "two")) == list(range(1, 15))


def test_processes_end_together_when_the_time_of_a_run_is_over(tmp_path):
    schedule = {"type": "cosine", "warmup_proportion": 0.1}
    path = write_config(
        tmp_path,
        training__max_steps=None,
        training__micro_batch_size=None,
        schedule=schedule,
        data__validation_fraction=0.2,
    )
    timed = train("--config", str(path), "--max_hours", "0.002", "--set", "eval.every_steps=3", processes=2)
    assert timed.returncode == 0, timed.stderr
    (finished,) = (line for line in timed.stdout.splitlines() if line.startswith("  steps       "))
    steps = max(losses(tmp_path / "runs" / "run"))
    assert finished == f"  steps       {steps:,} in training.max_hours 0.002"
    state = store.read_state(store.resolve(tmp_path / "runs" / "run", "latest"))
    assert (state["step"], state["elapsed_s"], state["max_hours"]) == (steps, 7.2, 0.002)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)])
def test_a_signal_ends_the_run_after_a_checkpoint_from_which_it_goes_on_exactly(number, status, tmp_path):
    # More steps than any machine takes before the signal.
    path = write_config(tmp_path, training__max_steps=100_000, schedule__type="constant", schedule__total_steps=None)
    log = tmp_path / "runs" / "cut" / "metrics.jsonl"
    command = [sys.executable, "-m", "xformer_train.launcher", "--config", str(path), "--job_name"]
    process = subprocess.Popen(
        [*command, "cut"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ONE_THREAD
    )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not (log.exists() and log.read_text().count("\n") >= 3):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == status, err
    assert "run cut stopped as asked" in out
    assert "--resume auto" in out
    last = max(losses(log.parent))
    assert [p.name for p in (log.parent / "checkpoints").glob("step*")] == [f"step{last:08d}"]

    total = f"training.max_steps={last + 3}"
    train_quickly(path, *(([f"name={name}", total], True) for name in ("cut", "straight")))
    root = tmp_path / "runs"
    assert losses(root / "cut") == losses(root / "straight")
    ours, theirs = (weights(root / name / "checkpoints" / f"step{last + 3:08d}") for name in ("cut", "straight"))
    assert all(ours[name].equal(theirs[name]) for name in ours)


@pytest.mark.slow
def test_torchrun_starts_a_run_too(tmp_path):
    path = write_config(tmp_path, training__max_steps=3)
    place = ["--standalone", "--nproc-per-node", "2"]
    command = [LAUNCHER.with_name("torchrun"), *place, "-m", "xformer_train.launcher", "--config", path]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=PATIENCE_S, env=ONE_THREAD, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert sorted(losses(tmp_path / "runs" / "run")) == [1, 2, 3]


def test_nothing_but_the_runs_own_lines_is_printed(tmp_path):
    done = train("--config", str(write_config(tmp_path, training__max_steps=2)))
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1].lstrip().startswith("to export")
