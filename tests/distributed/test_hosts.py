"""A run on two hosts, one of which is cut off: each host is a network namespace of this machine."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import two_hosts
from helpers.runs import losses, write_config
from helpers.spawn import PATIENCE_S


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What happened to a run whose second host was cut off, and to the one that continued it."""
    reason = two_hosts.reason_to_skip()
    if reason is not None:
        pytest.skip(reason)
    folder, hosts = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("hosts")
    config = write_config(
        folder,
        reliability__hang_timeout_s=10.0,
        checkpoint__save_every_steps=3,
        schedule__type="constant",
        schedule__total_steps=None,
    )
    metrics = folder / "runs" / "run" / "metrics.jsonl"
    worker = Path(__file__).with_name("workers") / "hosts.py"
    words = [sys.executable, str(worker), str(config), str(hosts / "hosts"), str(metrics)]
    done = subprocess.run(
        two_hosts.command(hosts, *words),
        check=False,
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE_S,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), "metrics": metrics}


@pytest.mark.slow
def test_a_run_that_loses_a_host_ends_on_both_and_says_so(report):
    assert report["exit_code"] != 0
    assert report["left"] == []
    assert (
        "10.77.0.2: the launcher ended with exit code 255: ssh could not connect, or lost its connection"
        in report["err"]
    )
    # Last comes what the first rank to fail said.
    assert re.search(r"^rank [01] on \S+ ended with exit code \d+\n.", report["err"], re.MULTILINE)


@pytest.mark.slow
def test_it_goes_on_from_its_last_checkpoint_when_the_host_is_back(report):
    assert report["resumed_exit_code"] == 0, report["resumed_err"]
    assert report["processes_in_the_end"] == []
    assert "start      from" in report["resumed_out"]
    assert "from new weights" not in report["resumed_out"]
    assert sorted(losses(report["metrics"].parent)) == list(range(1, len(losses(report["metrics"].parent)) + 1))
