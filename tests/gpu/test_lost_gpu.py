"""What tests/conftest.py does after a test that leaves CUDA in error for the rest of its process; played without a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PLAYED = """
import pytest, torch

LOST = []

@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    def synchronize():
        if LOST:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, synchronize

@pytest.mark.parametrize("number", range(8))
def test_kernel(number):
    if number == 3:
        LOST.append(number)
    torch.cuda.synchronize()
"""


@pytest.mark.slow
def test_after_a_test_that_breaks_the_gpu_the_others_run_in_a_new_process(tmp_path):
    (tmp_path / "test_played.py").write_text(PLAYED)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "1", "-p", "conftest", "-c", os.devnull, str(tmp_path)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "7 passed" in done.stdout, done.stdout
    failed = re.findall(r"^FAILED .*::(test_kernel\[\d\])", done.stdout, re.M)
    assert set(failed) == {"test_kernel[3]"}
    assert "illegal memory access" in done.stdout
