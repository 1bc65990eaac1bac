"""Runs whose processes are killed and started again, by `launch` and by torchrun."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed.spawn import free_port
from runs import losses, write_config

from xformer_train.launcher.supervision import Outcome

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


def process_of_rank_1(run: Path, text: str) -> int:
    """Its id, once it trains: as its log says."""
    log = run / "log" / "rank1.log"
    deadline = time.monotonic() + 100
    while not (log.exists() and (run / "checkpoints" / "latest").exists()):
        assert time.monotonic() < deadline, text
        time.sleep(0.05)
    return int(log.read_text().split("pid ")[1].split()[0])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["launch", "torchrun"])
def test_a_run_with_a_killed_process_goes_on_from_its_checkpoint(launcher, tmp_path):
    """No step is missing, and the second start goes on from a checkpoint."""
    path = write_config(tmp_path, training__max_steps=300, checkpoint__save_every_steps=5, schedule__total_steps=None)
    if launcher == "launch":
        command = [PROGRAMS / "xformer-train", "launch", "--config", path, "--processes", "2", "--max-restarts", "1"]
    else:
        places = ["--nproc-per-node", "2", "--max-restarts", "1", "--master-port", str(free_port())]
        run = ["-m", "xformer_train.launcher", "--config", path, "--resume", "auto"]
        command = [PROGRAMS / "torchrun", *places, *run]
    with (tmp_path / "out").open("wb") as out:
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=out, env=ENVIRONMENT)
    try:
        os.kill(process_of_rank_1(tmp_path / "runs" / "run", ""), signal.SIGKILL)
        status = process.wait(timeout=200)
    finally:
        process.kill()
    text = (tmp_path / "out").read_text()
    assert status == 0, text
    assert "start      from new weights" in text and "/checkpoints/step" in text
    if launcher == "launch":
        assert "restart 1 of 1, with --resume auto" in text
    assert sorted(losses(tmp_path / "runs" / "run")) == list(range(1, 301))
