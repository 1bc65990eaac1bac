"""Runs whose processes are killed and started again, by `launch` and by torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.runs import losses, write_config
from helpers.spawn import PATIENCE_S, free_port

from xformer_train.launcher.machines.supervision import Outcome

PROGRAMS = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{PROGRAMS}:{os.environ['PATH']}"}


@pytest.mark.parametrize(
    ("outcome", "again"),
    [
        (Outcome(0, ""), False),
        (Outcome(1, "Traceback"), True),
        (Outcome(137, "rank 1 ended without a word"), True),
        (Outcome(2, "unknown key"), False),
        (Outcome(75, "stopped by a scheduler"), False),
        (Outcome(143, "ended by a signal to launch", told_to_end=True), False),
    ],
)
def test_what_failed_of_itself_is_started_again(outcome, again):
    assert outcome.may_start_again == again


# Python runs this at its start. A test that killed the process from outside might come after the end of the run.
KILL_RANK_1 = """
import os, signal, threading, time
from pathlib import Path

def die_after_a_save():
    while not Path({latest!r}).exists():
        time.sleep(0.001)
    Path({killed!r}).touch()
    os.kill(os.getpid(), signal.SIGKILL)

if os.environ.get("RANK") == "1" and not Path({killed!r}).exists():
    threading.Thread(target=die_after_a_save, daemon=True).start()
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["launch", "torchrun"])
def test_a_run_with_a_killed_process_goes_on_from_its_checkpoint(launcher, tmp_path):
    """No step is missing, and the second start goes on from a checkpoint."""
    latest, killed = tmp_path / "runs" / "run" / "checkpoints" / "latest", tmp_path / "killed"
    (tmp_path / "sitecustomize.py").write_text(KILL_RANK_1.format(latest=str(latest), killed=str(killed)))
    path = write_config(tmp_path, training__max_steps=60, checkpoint__save_every_steps=5, schedule__total_steps=None)
    if launcher == "launch":
        command = [PROGRAMS / "xformer-train", "launch", "--config", path, "--processes", "2", "--max-restarts", "1"]
    else:
        places = ["--nproc-per-node", "2", "--max-restarts", "1", "--master-port", str(free_port())]
        run = ["-m", "xformer_train.launcher", "--config", path, "--resume", "auto"]
        command = [PROGRAMS / "torchrun", *places, *run]
    environment = ENVIRONMENT | {"PYTHONPATH": str(tmp_path)}
    with (tmp_path / "out").open("wb") as out:
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=out, env=environment)
    try:
        status = process.wait(timeout=PATIENCE_S)
    finally:
        process.kill()
    text = (tmp_path / "out").read_text()
    assert status == 0, text
    assert killed.exists()
    assert "start      from new weights" in text and "/checkpoints/step" in text
    if launcher == "launch":
        assert "restart 1 of 1, with --resume auto" in text
    assert sorted(losses(tmp_path / "runs" / "run")) == list(range(1, 61))
