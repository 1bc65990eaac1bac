"""The FP8 kernels compiled for sm_90 without a GPU, judged as test_aot.py judges the others. sm_80 has no FP8 casts.

`python test_fp8_aot.py` prints one JSON object per kernel variant.
"""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest

_CAPABILITY = 90


def _launches():
    """Pairs of name and launch: every variant. Sizes select none."""
    import torch

    from xformer_train.kernels.fp8.cast_triton import quantize
    from xformer_train.kernels.fp8.mlp_triton import gelu_backward_quantize, gelu_quantize

    fp8_dtypes, dtypes = (torch.float8_e4m3fn, torch.float8_e5m2), (torch.bfloat16, torch.float16, torch.float32)
    layouts = ((True, True), (True, False), (False, True))
    for fp8_dtype, dtype, delayed, (rows, columns) in itertools.product(fp8_dtypes, dtypes, (True, False), layouts):
        x, scale = torch.empty(64, 1024, dtype=dtype), torch.ones(()) if delayed else None
        name = f"quantize {dtype} to {fp8_dtype} delayed={delayed} rows={rows} columns={columns}"
        yield name, partial(quantize, x, scale, None, fp8_dtype, rows, columns)
    for dtype, delayed, activation in itertools.product(dtypes, (True, False), ("gelu", "gelu_tanh")):
        f, scale = torch.empty(64, 1024, dtype=dtype), torch.ones(()) if delayed else None
        for rows, columns in layouts if dtype == torch.bfloat16 else layouts[:1]:
            name = f"{activation} {dtype} delayed={delayed} rows={rows} columns={columns}"
            if rows:
                yield f"quantize {name}", partial(gelu_quantize, f, scale, activation, fp8_dtypes[0], columns)
            backward = partial(gelu_backward_quantize, f, f, scale, activation, fp8_dtypes[1], rows, columns)
            yield f"backward quantize {name}", backward


def _print_resources():
    from test_aot import _activate_compiler, _compiled_kernels, _faults, _resources

    _activate_compiler(_CAPABILITY)
    seen = set()
    with tempfile.TemporaryDirectory() as folder:
        for name, launch in _launches():
            for kernel_name, kernel in _compiled_kernels(launch):
                if id(kernel) in seen:
                    continue
                seen.add(id(kernel))  # triton keeps every kernel, so the number stays its own
                row = {"case": name, "kernel": kernel_name, "dots": False, "narrow": False}
                row |= _resources(kernel, Path(folder))
                print(json.dumps(row | {"faults": list(_faults(row, _CAPABILITY))}), flush=True)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_fp8_kernels_compile_without_spills_and_with_wide_loads():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert rows
    assert not [(row["case"], row["faults"]) for row in rows if row["faults"]]


if __name__ == "__main__":
    _print_resources()
