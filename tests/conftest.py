"""What holds for every test: the numbers it draws, and the process it may leave behind."""

import os
import signal
import sys

import pytest


@pytest.fixture(autouse=True)
def signal_handlers_from_before():
    """A command leaves SIGTERM and SIGUSR1 without effect, as its process ends with it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.hookimpl(tryfirst=True)  # before the fixtures, which draw too
def pytest_runtest_setup() -> None:
    """Lets every test draw the same numbers, whatever ran before it: two processes share the files as they get done."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.hookimpl(trylast=True)  # after pytest-xdist has sent the report
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Ends a process of pytest-xdist that a failed test has left without a working GPU, and xdist starts another one.

    After an illegal access CUDA answers every call of the process with that error, so all later tests would fail in it.
    """
    if report.failed and "PYTEST_XDIST_WORKER" in os.environ and _gpu_is_lost():
        os._exit(1)


def _gpu_is_lost() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
