"""Every test draws the same numbers, whatever ran before it in its process: two processes share the files as they get done."""

import sys

import pytest


@pytest.hookimpl(tryfirst=True)  # before the fixtures, which draw too
def pytest_runtest_setup() -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
