"""Every GPU kernel compiled for sm_90 without a GPU; a file of its own, which runs beside that of sm_80."""

import importlib.util

import pytest
from helpers.aot import check_every_kernel

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.slow
@needs_triton
def test_every_kernel_compiles_without_spills_and_with_the_fast_instructions():
    check_every_kernel(90)
