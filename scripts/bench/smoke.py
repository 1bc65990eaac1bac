"""Every kernel once, at sizes of BERT-Large, against the same formula in fp64; the first thing to run on a new GPU.

Each line says how far output and gradients are off, relative and at the worst tensor, and how far torch is in the same dtype.
An op may have twice torch's error and one rounding; FP8 may have FP8_ERROR. Dropout is on where the op has one: the mask is
read off the op itself, so that the formula uses the same decisions. On a CPU the same ops run on their reference path at small
sizes, which shows that this file still fits them and nothing of the kernels.

A line is printed as soon as its op has run, the exit status is 1 if one was wrong or failed. --out gets the lines as JSON.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench_device import default_device, machine_line, synchronize
from smoke_cases import CPU_SIZES, GPU_SIZES, Case, Op, cases
from torch import Tensor


def results(op: Op, inputs: Sequence[Tensor], dys: Sequence[Tensor]) -> list[Tensor]:
    """Outputs and input gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = op(*leaves)
    gradients = torch.autograd.grad(outputs, leaves, [dy.to(y.dtype) for dy, y in zip(dys, outputs, strict=True)])
    return [y.detach() for y in outputs] + list(gradients)


def check(case: Case, device: torch.device) -> dict[str, Any]:
    """The record of a case: the largest relative errors of ours and of torch, and whether all of ours are allowed."""
    torch.manual_seed(0)
    started_s = time.monotonic()
    normal = (torch.randn(shape, device=device) for shape in case.shapes)
    inputs = [(1 + 0.1 * x if x.dim() == 1 else case.spread * x).to(case.dtype) for x in normal]
    with torch.no_grad():
        dys = [torch.randn_like(y) for y in case.op(*inputs)]
    exact = results(case.formula, [x.double() for x in inputs], dys)
    torchs = results(case.formula, inputs, dys)
    ours = results(case.op, inputs, dys)
    synchronize(device)
    errors, right = [], True
    for mine, theirs, wanted in zip(ours, torchs, exact, strict=True):
        size = wanted.norm()
        error, usual = ((result.double() - wanted).norm() / size for result in (mine, theirs))
        allowed = 2 * usual + torch.finfo(case.dtype).eps if case.allowed_error is None else case.allowed_error
        right = right and bool(error <= allowed)
        errors.append((error.item(), usual.item()))
    error, usual = max(errors)
    return {"case": case.name, "right": right, "error": error, "torchs": usual, "s": time.monotonic() - started_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON lines go here; the file is written anew")
    arguments = parser.parse_args()
    device = default_device()
    torch.backends.cuda.matmul.allow_tf32 = False
    records: list[dict[str, Any]] = []
    print(machine_line(), flush=True)
    for case in cases(GPU_SIZES if device.type == "cuda" else CPU_SIZES, device):
        try:
            record = check(case, device)
            words = f"off by {record['error']:.1e}, torch by {record['torchs']:.1e}, {record['s']:.1f} s"
        except Exception as failure:  # of whatever kind: the other kernels go on
            traceback.print_exc()
            words = " ".join(f"{type(failure).__name__}: {failure}".split())[:200]
            record = {"case": case.name, "right": False, "failed": words}
        records.append(record)
        print(f"{'right' if record['right'] else 'WRONG'}  {case.name}: {words}", flush=True)
        if arguments.out is not None:
            arguments.out.write_text("".join(json.dumps(one) + "\n" for one in records))
    if not all(record["right"] for record in records):
        sys.exit("a kernel is wrong or failed")


if __name__ == "__main__":
    main()
