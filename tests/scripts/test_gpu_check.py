"""gpu_check.sh has to be right at its first run on a GPU: both calls run on a CPU, and what can go wrong goes wrong here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.sh"


def run(out, *arguments, path=Path(sys.executable).parent):
    environment = os.environ | {"PATH": f"{path}:{os.environ['PATH']}", "OUT": str(out), "OMP_NUM_THREADS": "1"}
    return subprocess.run(["sh", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def stub(tmp_path):
    """A python3 in the place of the real one, of which the test says what it does in each step."""

    def write(**steps):
        words = {"tests": "-m pytest", "train": "bench_train.py", "smoke": "smoke.py"}
        cases = "".join(f"*'{words[step]}'*) {commands} ;;\n" for step, commands in steps.items())
        path = tmp_path / "python3"
        path.write_text(f'#!/bin/sh\ncase "$*" in\n*bench_device.py) echo "A GPU" ;;\n{cases}*) echo fine ;;\nesac\n')
        path.chmod(0o755)
        return tmp_path

    return write


def test_the_limits_of_both_calls_fit_the_time_that_they_have():
    printed = subprocess.run(["sh", str(SCRIPT), "plan"], capture_output=True, text=True, check=True).stdout
    steps = re.findall(r"^(\S+) +about +(\d+) s, at most +(\d+) s$", printed, re.M)
    assert all(int(about) <= int(limit) for _, about, limit in steps)
    first, second = (int(limit) for name, _, limit in steps if name == "sum")
    assert first <= 240
    assert second <= 380
    assert {"smoke", "attention", "layer-128", "layer-512", "layer-te", "tests", "train", "memory"} < {
        s[0] for s in steps
    }


@pytest.mark.slow
@pytest.mark.parametrize("call", ["first", "second"])
def test_both_calls_run_on_a_cpu(call, tmp_path):
    out = tmp_path / "out"
    done = run(out, "--dry-run", call)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = (out / "summary.txt").read_text()
    assert summary == done.stdout
    assert torch.__version__ in summary.splitlines()[0]
    assert "FAILED" not in summary
    results = {path.name for path in out.iterdir()} - {"summary.txt", "log.txt"}
    layers = {"layer_128.jsonl", "layer_512.jsonl", "layer_te.jsonl"}
    assert results == (
        {"smoke.jsonl", "attention.jsonl"} | layers if call == "first" else {"train.json", "memory.jsonl"}
    )
    if call == "first":
        assert len(re.findall(r"^right ", summary, re.M)) > 15
        assert summary.count("torch's attention at") == 3
        assert len(re.findall("^te-quickstart-small +ours, FP8", summary, re.M)) == 1


def test_a_step_that_fails_stops_no_other_and_leaves_its_traceback(tmp_path, stub):
    done = run(
        tmp_path / "out",
        "second",
        path=stub(tests="echo 3 passed", train="echo half a table; echo the traceback >&2; exit 3"),
    )
    assert done.returncode == 1
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert re.findall(r"^== (\S+): (.*), \d+ s$", summary, re.M) == [
        ("tests", "passed"),
        ("train", "FAILED: exit status 3"),
        ("memory", "passed"),
    ]
    assert "half a table\nthe traceback\n" in summary
    assert summary.endswith("failed: train\n")
    assert "train: the traceback" in (tmp_path / "out" / "log.txt").read_text()


@pytest.mark.parametrize("printed", ["== 5 skipped in 0.1s ==", "no tests ran in 0.1s"])
def test_tests_that_were_all_skipped_count_as_failed(printed, tmp_path, stub):
    done = run(tmp_path / "out", "second", path=stub(tests=f"echo {printed}"))
    assert done.returncode == 1
    assert "== tests: FAILED: no test ran, all were skipped" in done.stdout


def test_a_step_beyond_its_limit_is_interrupted_and_says_so(tmp_path, stub):
    """With a `timeout` that gives each step a second in place of its limit."""
    folder = stub(smoke="trap 'echo what there is; exit 1' INT; sleep 20 >/dev/null 2>&1 & wait")
    (folder / "timeout").write_text('#!/bin/sh\nshift 5\nexec /usr/bin/timeout -s INT -k 15 1 "$@"\n')
    (folder / "timeout").chmod(0o755)
    done = run(tmp_path / "out", "first", path=folder)
    assert "what there is\n" in done.stdout
    assert "== smoke: FAILED: ran out of its time" in done.stdout
    assert "== attention: passed" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_it_refuses_a_machine_without_a_gpu(tmp_path):
    done = run(tmp_path / "out", "first")
    assert done.returncode == 1
    assert "needs a CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [(), ("third",), ("first", "second"), ("--dry-run",)])
def test_it_says_what_it_can_be_asked(arguments, tmp_path):
    done = run(tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")
