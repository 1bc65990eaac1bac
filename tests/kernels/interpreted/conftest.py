"""These tests run the GPU kernels: on a CPU in triton's interpreter, on a machine with a GPU compiled, marked gpu.

Triton decides for or against its interpreter when it is first imported, for the whole process. So without a GPU the folder
is skipped where triton is missing and where something imported it before. TRITON_INTERPRET=1 in the environment asks for the
interpreter on a machine with a GPU too, and needs a process for this folder alone.
"""

import importlib.util
import os
import sys

import pytest
import torch

ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"


def _obstacle():
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1" and "triton" in sys.modules:
        return "triton was imported without TRITON_INTERPRET=1; run this folder in a process of its own"
    return None


_OBSTACLE = _obstacle()
if _OBSTACLE is None and not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"


class _SkippedModule(pytest.Module):
    def collect(self):
        raise pytest.skip.Exception(_OBSTACLE, allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    """Skips the modules of this folder before they import triton."""
    return None if _OBSTACLE is None else _SkippedModule.from_parent(parent, path=module_path)


def pytest_itemcollected(item):
    """Marks the tests of this folder as what they are here."""
    if ON_GPU:
        item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def new_tensors_lie_where_the_kernels_run():
    with torch.device("cuda" if ON_GPU else "cpu"):
        yield


@pytest.fixture
def unwritten_memory_is_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)  # which also fills what torch.empty gives
    yield
    torch.use_deterministic_algorithms(False)
