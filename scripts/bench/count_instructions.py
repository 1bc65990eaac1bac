"""What each GPU kernel costs, counted in the machine code of an ahead-of-time build; needs no GPU.

    python scripts/bench/count_instructions.py --arch 90 --cases 'attention S512 D64 lengths'

compiles the launches of tests/kernels/aot_cases.py whose names match and prints one row per kernel variant:
  regs, spills   registers per thread, bytes of stack and accesses to it
  smem, CTAs     bytes of shared memory of a program (CTA), and how many programs an SM holds by registers, memory and warps
  loops          instructions of each innermost loop, in order of their addresses; attention's forward and dQ kernels have two,
                 for tiles seen whole and for masked ones. "-" where there is none
  all            instructions of the whole kernel
  MUFU, WIDE     per innermost loop, or of the whole kernel without one: exp2, rcp and the like; 32 x 32 bit products with
                 64-bit results, nearly all of which are Philox
The counts are per warp and iteration. With --json each row is a JSON object, with what tests/helpers/aot.py asks besides.
"""

import argparse
import itertools
import json
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

CASES = Path(__file__).parents[2] / "tests" / "kernels"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION_BYTES = 16
COLUMNS = ("case", "kernel", "regs", "spills", "smem", "CTAs", "loops", "all", "MUFU", "WIDE")


@dataclass(frozen=True)
class SM:
    """What the programs on one SM share: bytes of memory, of which each program loses a KiB, and warps."""

    shared_bytes: int
    warps: int
    registers: int = 65536

    def programs(self, registers: int, shared_bytes: int, num_warps: int) -> int:
        """Return how many programs of a kernel fit at once."""
        registers_of_warp = (registers + 7) // 8 * 8 * 32
        return min(
            self.registers // registers_of_warp // num_warps,
            self.shared_bytes // (shared_bytes + 1024),
            self.warps // num_warps,
            32,
        )


SMS = {80: SM(164 * 1024, 64), 90: SM(228 * 1024, 64)}


class CompileOnlyDriver(DriverBase):
    """Make triton believe in a GPU of this compute capability, which can compile but not run."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # compiled kernels are cached per device number: one number per target

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise AssertionError("nothing runs here")


def compiled_kernels(launch: Callable[[], object]) -> list[tuple[str, Any]]:
    """Return what `launch` would have run: pairs of kernel name and compiled kernel, each variant once."""
    compiled = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[id(kernel)] = (self.fn.__name__, kernel)
        return kernel

    JITFunction.run = compile_only
    try:
        launch()
    finally:
        JITFunction.run = run
    return list(compiled.values())


def disassembled(kernels: Sequence[Any], capability: int, folder: Path) -> list[list[tuple[int, str]]]:
    """Return of each kernel its instructions, pairs of address and text without predicate, up to the padding behind them.

    All in one process of the disassembler, whose start takes longer than a kernel; addresses count from the first kernel.
    """
    codes, file = [code_of(kernel.asm["cubin"]) for kernel in kernels], folder / "code"
    file.write_bytes(b"".join(codes))
    command = [TOOLS / "nvdisasm", "--binary", f"SM{capability}", file]
    sass = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([^;]+);", sass)
    remaining, end, each = iter([(int(address, 16), text.strip()) for address, text in lines]), 0, []
    for code in codes:
        whole = list(itertools.islice(remaining, len(code) // _INSTRUCTION_BYTES))
        end += len(code)
        assert whole[-1][0] == end - _INSTRUCTION_BYTES, "an instruction of another length"
        each.append(whole[: next(i for i, (address, text) in enumerate(whole) if _target(text) == address)])
    return each


def code_of(cubin: bytes) -> bytes:
    """Return the instructions in an ELF file of one kernel."""
    sections_at, (size, count, names) = struct.unpack_from("<Q", cubin, 40)[0], struct.unpack_from("<3H", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, sections_at + i * size) for i in range(count)]
    strings = sections[names][4]
    (code,) = (s for s in sections if cubin.startswith(b".text.", strings + s[0]))
    return cubin[code[4] : code[4] + code[5]]


def _target(text: str) -> int | None:
    found = re.match(r"BRA\S* (?:.*, )?(?:`\(.*\)|0x([0-9a-f]+))", text)
    return int(found[1], 16) if found and found[1] else None


def innermost_loops(instructions: list[tuple[int, str]]) -> list[list[str]]:
    """Return the instructions of each loop that holds no other loop."""
    ends: dict[int, int] = {}
    for address, text in instructions:
        target = _target(text)
        if target is not None and target <= address:
            ends[target] = address  # of several branches back to one place the last ends the loop
    spans = [
        (first, last)
        for first, last in ends.items()
        if not any((first, last) != (a, b) and first <= a and b <= last for a, b in ends.items())
    ]
    return [[text for address, text in instructions if first <= address <= last] for first, last in sorted(spans)]


def facts_of(kernel: Any, instructions: list[tuple[int, str]], capability: int, folder: Path) -> dict[str, Any]:
    """Return the counts of one compiled kernel, by the names of COLUMNS and those that tests/helpers/aot.py asks about."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run(
        [TOOLS / "cuobjdump", "-res-usage", cubin], check=True, capture_output=True, text=True
    ).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    sass = "\n".join(text for _, text in instructions)
    loops = innermost_loops(instructions)
    bodies = loops or [[text for _, text in instructions]]
    num_warps, shared = kernel.metadata.num_warps, kernel.metadata.shared

    def counts(pattern: str) -> list[int]:
        return [sum(bool(re.match(pattern, text)) for text in body) for body in bodies]

    return {
        "regs": registers,
        "spills": stack,  # triton's kernels put nothing else on the stack
        "local_accesses": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "smem": shared,
        "warps": num_warps,
        "CTAs": SMS[capability].programs(registers, shared, num_warps),
        "loops": [len(loop) for loop in loops],
        "all": len(instructions),
        "MUFU": counts("MUFU"),
        "WIDE": counts(r"IMAD\.(?:WIDE|HI)"),
        "wgmma": len(re.findall(r"\bHGMMA", sass)),
        "mma": len(re.findall(r"\bHMMA", sass)),
        "wide_loads": len(re.findall(r"\bLDG\.E\.(?:[A-Z]+\.)*128|\bLDGSTS\.E\.(?:[A-Z]+\.)*128|\bUTMALDG", sass)),
    }


def rows_of(capability: int, pattern: str) -> Iterator[dict[str, Any]]:
    """Yield the facts of every kernel variant that the matching cases launch, each variant once."""
    sys.path.insert(0, str(CASES))
    from aot_cases import cases

    found: dict[int, tuple[dict[str, Any], Any]] = {}  # triton keeps every kernel, so the number stays its own
    for case in cases(capability):
        for name, kernel in compiled_kernels(case.launch) if re.search(pattern, case.name) else ():
            marks = {"dots": name in case.dot_kernels, "narrow": name in case.narrow_kernels}
            found.setdefault(id(kernel), ({"case": case.name, "kernel": name, **marks}, kernel))
    with tempfile.TemporaryDirectory() as name:
        codes = disassembled([kernel for _, kernel in found.values()], capability, Path(name))
        for (row, kernel), instructions in zip(found.values(), codes, strict=True):
            yield {**row, **facts_of(kernel, instructions, capability, Path(name))}


def cell(value: Any) -> str:
    """Return a value of a row as the table shows it."""
    if isinstance(value, list):
        return " ".join(map(str, value)) or "-"
    return str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, choices=sorted(SMS), default=90, help="compute capability times ten")
    parser.add_argument("--cases", default="", metavar="REGEX", help="names of cases; all take minutes")
    parser.add_argument("--json", action="store_true", help="one JSON object per row in place of a table")
    arguments = parser.parse_args()
    triton.runtime.driver.set_active(CompileOnlyDriver(arguments.arch))
    if not arguments.json:
        print(
            f"triton {triton.__version__}, sm_{arguments.arch}\n\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"
        )
    for row in rows_of(arguments.arch, arguments.cases):
        print(json.dumps(row) if arguments.json else f"| {' | '.join(cell(row[c]) for c in COLUMNS)} |", flush=True)


if __name__ == "__main__":
    main()
