"""The first Ctrl-C or signal of a scheduler asks, the second Ctrl-C ends."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from helpers.runs import metrics, write_config

from xformer_train.launcher.config.loading import load_config
from xformer_train.launcher.processes.rank_status import REQUEUE
from xformer_train.launcher.processes.signals import StopAsked, StopRequest
from xformer_train.launcher.processes.topology import Topology
from xformer_train.launcher.training import loop
from xformer_train.launcher.training.train import run

ALONE = Topology(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
OTHER = Topology(rank=1, world_size=2, local_rank=1, device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def handlers_from_before():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, REQUEUE), (signal.SIGUSR1, REQUEUE)]
)
def test_the_first_signal_asks_for_a_stop_and_says_what_will_happen(capfd, number, status):
    with StopRequest(ALONE) as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), number)
        assert stop.received == number and stop.agreed()
        assert stop.exit_status == status
    assert f"{number.name}: finishing this step, then saving a checkpoint" in capfd.readouterr().err


def test_only_the_main_process_speaks(capfd):
    with StopRequest(OTHER) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
    assert capfd.readouterr().err == ""


def test_handlers_from_before_come_back_also_after_an_error():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyError), StopRequest(ALONE):
        assert signal.getsignal(signal.SIGINT) != before[0]
        raise KeyError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_sigterm_after_a_stop_does_not_hasten_the_end():
    """DeepSpeed's launcher sends one to those that are left when the first process has ended."""
    with StopRequest(ALONE) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.agreed()
    os.kill(os.getpid(), signal.SIGTERM)  # would end this process
    os.kill(os.getpid(), signal.SIGUSR1)


def test_later_sigterms_change_nothing(capfd):
    with StopRequest(ALONE) as stop:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.agreed() and stop.exit_status == 0  # a launcher passed the Ctrl-C on
    assert capfd.readouterr().err.count("finishing") == 1


def test_a_signal_ends_work_that_saves_nothing_at_once(capfd):
    with StopRequest(ALONE) as stop:
        with pytest.raises(StopAsked), stop.raising():
            os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.agreed() and stop.exit_status == REQUEUE
        with pytest.raises(StopAsked), stop.raising():
            pytest.fail("begun after the signal")
    assert "SIGUSR1: stopping; Ctrl-C again" in capfd.readouterr().err


def test_a_second_ctrl_c_leaves_at_once_with_130():
    script = """
import os, signal, torch
from xformer_train.launcher.processes.signals import StopRequest
from xformer_train.launcher.processes.topology import Topology
with StopRequest(Topology(0, 1, 0, torch.device("cpu"))):
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("never printed", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "still here\n")


def test_a_signal_cuts_an_evaluation_short_and_the_step_before_it_is_saved(tmp_path, monkeypatch):
    right = loop.evaluate

    def evaluate(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return right(*args)

    monkeypatch.setattr(loop, "evaluate", evaluate)
    path = write_config(tmp_path, data__validation_fraction=0.2, eval__every_steps=3)
    assert run(load_config(path, (), world_size=1), resume=False) == REQUEUE
    assert [row["step"] for row in metrics(tmp_path / "runs" / "run")] == [1, 2, 3]  # no held-out loss
    assert (tmp_path / "runs" / "run" / "checkpoints" / "latest").read_text() == "step00000003\n"
