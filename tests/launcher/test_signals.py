"""The first Ctrl-C or SIGTERM asks, the second Ctrl-C ends."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from xformer_train.launcher.signals import StopRequest
from xformer_train.launcher.topology import Topology

ALONE = Topology(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
OTHER = Topology(rank=1, world_size=2, local_rank=1, device=torch.device("cpu"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_for_a_stop_and_says_what_will_happen(capfd, number):
    with StopRequest(ALONE) as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), number)
        assert stop.requested and stop.agreed()
    assert f"{number.name}: finishing this step, then saving a checkpoint" in capfd.readouterr().err


def test_only_the_main_process_speaks(capfd):
    with StopRequest(OTHER) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert capfd.readouterr().err == ""


def test_handlers_from_before_come_back_also_after_an_error():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyError), StopRequest(ALONE):
        assert signal.getsignal(signal.SIGINT) != before[0]
        raise KeyError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_later_sigterms_change_nothing(capfd):
    with StopRequest(ALONE) as stop:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.requested
    assert capfd.readouterr().err.count("finishing") == 1


def test_a_second_ctrl_c_leaves_at_once_with_130():
    script = """
import os, signal, torch
from xformer_train.launcher.signals import StopRequest
from xformer_train.launcher.topology import Topology
with StopRequest(Topology(0, 1, 0, torch.device("cpu"))):
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("never printed", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "still here\n")
