"""Three kills of the soak test, whose figures for a hundred are in docs/reliability.md."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.spawn import PATIENCE_S

SOAK = Path(__file__).parents[2] / "scripts" / "bench" / "soak.py"


@pytest.mark.slow
def test_killed_runs_go_on_and_lose_nothing():
    done = subprocess.run(
        [sys.executable, str(SOAK), "--kills", "3"],
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    report = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and report["faults"] == [], report
    assert report["kills"] == 3 and report["inside_a_save"] >= 1
    assert report["losses_compared"] >= 200 and report["checkpoints"] >= 50
