"""Every GPU kernel compiled for sm_80 and sm_90 without a GPU: registers, spills, shared memory, fast instructions."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "count_instructions.py"

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def _rows(capability, *options):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, _SCRIPT, "--arch", str(capability), "--json", *options]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def _faults(row, capability):
    if row["spills"] or row["local_accesses"]:
        yield f"spills {row['spills']} bytes"
    if row["CTAs"] < 1:
        yield f"needs {row['regs']} registers in {row['warps']} warps and {row['smem']} bytes of shared memory"
    if row["dots"] and not (row["wgmma"] if capability == 90 else row["mma"]):
        yield "does not use the tensor cores"
    if row["dots"] and capability == 90 and row["mma"]:
        yield "uses the slow mma instructions of older GPUs"
    if not row["dots"] and not row["narrow"] and not row["wide_loads"]:
        yield "loads less than 128 bits at a time"


@needs_triton
def test_instructions_are_counted_loop_by_loop():
    (row,) = _rows(80, "--cases", "softmax_loss_ V30522 bf16")
    assert row["kernel"] == "_softmax_loss_kernel"
    assert len(row["loops"]) == 2  # one pass sums, one writes; both take powers
    assert sum(row["loops"]) < row["all"]
    assert all(row["MUFU"])


@needs_triton
def test_packed_batches_of_any_number_of_tokens_share_their_kernels():
    rows = _rows(90, "--cases", "attention of three packed batches")
    assert [row["kernel"] for row in rows] == [
        "attention_forward",
        "attention_backward_queries",
        "attention_backward_keys",
    ]


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_without_spills_and_with_the_fast_instructions(capability):
    rows = _rows(capability)
    assert rows
    faults = [f"{row['case']} {row['kernel']} {fault}" for row in rows for fault in _faults(row, capability)]
    assert not faults, "\n".join(faults)
    variants = Counter((row["case"], row["kernel"]) for row in rows)
    assert [name for name, count in variants.items() if count > 1] == [], "compiled more than once"
