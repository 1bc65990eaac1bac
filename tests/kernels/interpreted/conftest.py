"""These tests run the GPU kernels on a CPU, in triton's interpreter.

Triton decides for or against it when it is first imported, for the whole process. So the folder is skipped where triton is
missing, where something imported it before, and on a machine with a GPU, whose other tests need the compiled kernels.
Run it there with TRITON_INTERPRET=1 in the environment.
"""

import importlib.util
import os
import sys

import pytest
import torch


def _obstacle():
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if "triton" in sys.modules:
        return "triton was imported without TRITON_INTERPRET=1; run this folder in a process of its own"
    if torch.cuda.is_available():
        return "this machine has a GPU; set TRITON_INTERPRET=1 and run this folder in a process of its own"
    return None


_OBSTACLE = _obstacle()
if _OBSTACLE is None:
    os.environ["TRITON_INTERPRET"] = "1"


class _SkippedModule(pytest.Module):
    def collect(self):
        raise pytest.skip.Exception(_OBSTACLE, allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    """Skips the modules of this folder before they import triton."""
    return None if _OBSTACLE is None else _SkippedModule.from_parent(parent, path=module_path)
