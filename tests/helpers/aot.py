"""Compile the GPU kernels without a GPU, and say what is wrong with what came out."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

_SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "count_instructions.py"


def rows_of(capability, *options):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, _SCRIPT, "--arch", str(capability), "--json", *options]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def faults_of(row, capability):
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


def check_every_kernel(capability):
    """Every kernel compiles once for each case, without spills and with the fast instructions."""
    rows = rows_of(capability)
    assert rows
    faults = [f"{row['case']} {row['kernel']} {fault}" for row in rows for fault in faults_of(row, capability)]
    assert not faults, "\n".join(faults)
    variants = Counter((row["case"], row["kernel"]) for row in rows)
    assert [name for name, count in variants.items() if count > 1] == [], "compiled more than once"
