"""Every GPU kernel compiled for sm_80 and sm_90 without a GPU: registers, spills, shared memory, instructions.

`python test_aot.py 90` compiles the cases of aot_cases.py for sm_90 and prints one JSON object per kernel variant.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

_SHARED_LIMIT_BYTES = {80: 163 * 1024, 90: 227 * 1024}
_REGISTERS_PER_SM = 65536


def _activate_compiler(capability):
    """Makes triton believe in a GPU of this compute capability, which can compile but not run."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class CompileOnlyDriver(DriverBase):
        @classmethod
        def is_active(cls):
            return True

        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self):
            return capability  # compiled kernels are cached per device number: one number per target

        def get_current_stream(self, device):
            return 0

        def get_active_torch_device(self):
            return torch.device("cpu")

        def map_python_to_cpp_type(self, ty):
            return ty

        def get_benchmarker(self):
            raise AssertionError("nothing runs here")

    triton.runtime.driver.set_active(CompileOnlyDriver())


def _compiled_kernels(launch):
    """What `launch` would have run: pairs of kernel name and compiled kernel, each variant once."""
    from triton.runtime.jit import JITFunction

    compiled = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[id(kernel)] = (self.fn.__name__, kernel)
        return kernel

    JITFunction.run = compile_only
    try:
        launch()
    finally:
        JITFunction.run = run
    return list(compiled.values())


def _resources(kernel, folder):
    """Registers, spill bytes, shared bytes, threads, and counts of the instructions that the assertions ask about."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [tools / "cuobjdump", "-res-usage", "-sass", cubin]
    sass = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", sass).groups()
    return {
        "registers": int(registers),
        "spill_bytes": int(stack),  # triton's kernels put nothing else on the stack
        "local_accesses": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "shared_bytes": kernel.metadata.shared,
        "threads": kernel.metadata.num_warps * 32,
        "wgmma": len(re.findall(r"\bHGMMA", sass)),
        "mma": len(re.findall(r"\bHMMA", sass)),
        "wide_loads": len(re.findall(r"\bLDG\.E\.(?:[A-Z]+\.)*128|\bLDGSTS\.E\.(?:[A-Z]+\.)*128|\bUTMALDG", sass)),
        "layout_changes": kernel.asm["ttgir"].count("ttg.convert_layout"),
    }


def _print_resources(capability):
    _activate_compiler(capability)
    from aot_cases import cases

    seen = set()
    with tempfile.TemporaryDirectory() as folder:
        for case in cases():
            for kernel_name, kernel in _compiled_kernels(case.launch):
                if id(kernel) in seen:
                    continue
                seen.add(id(kernel))  # triton keeps every kernel, so the number stays its own
                facts = _resources(kernel, Path(folder))
                row = {"case": case.name, "kernel": kernel_name, "dots": kernel_name in case.dot_kernels}
                row |= {"narrow": kernel_name in case.narrow_kernels, **facts}
                print(json.dumps(row), flush=True)


def _faults(row, capability):
    if row["spill_bytes"] or row["local_accesses"]:
        yield f"spills {row['spill_bytes']} bytes"
    if row["registers"] * row["threads"] > _REGISTERS_PER_SM:
        yield f"needs {row['registers']} registers in {row['threads']} threads"
    if row["shared_bytes"] > _SHARED_LIMIT_BYTES[capability]:
        yield f"needs {row['shared_bytes']} bytes of shared memory"
    if row["dots"] and not (row["wgmma"] if capability == 90 else row["mma"]):
        yield "does not use the tensor cores"
    if row["dots"] and capability == 90 and row["mma"]:
        yield "uses the slow mma instructions of older GPUs"
    if not row["dots"] and not row["narrow"] and not row["wide_loads"]:
        yield "loads less than 128 bits at a time"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_without_spills_and_with_the_fast_instructions(capability):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, str(capability)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert rows
    faults = [f"{row['case']} {row['kernel']} {fault}" for row in rows for fault in _faults(row, capability)]
    assert not faults, "\n".join(faults)
    variants = Counter((row["case"], row["kernel"]) for row in rows)
    assert [name for name, count in variants.items() if count > 1] == [], "compiled more than once"


if __name__ == "__main__":
    _print_resources(int(sys.argv[1]))
