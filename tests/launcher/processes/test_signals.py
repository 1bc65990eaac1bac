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


@pytest.mark.parametrize(("first", "status"), [("SIGUSR1", REQUEUE), ("SIGTERM", REQUEUE), ("SIGINT", 0), (None, 0)])
def test_no_later_signal_of_a_scheduler_changes_the_status_that_a_run_ends_with(first, status):
    """Slurm sends SIGUSR1 first and SIGTERM later, DeepSpeed's launcher SIGTERM to those that are left when one has ended.

    They come behind the run, behind the command, among the functions of atexit, and when the interpreter is taken down.
    """
    script = f"""
import atexit, os, signal, sys, torch
from xformer_train.launcher.commands.errors import requeued_by_signals
from xformer_train.launcher.processes.signals import StopRequest
from xformer_train.launcher.processes.topology import Topology

def late():
    for number in (signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), number)

class Last:  # when it goes, the names of this module are gone
    def __del__(self, kill=os.kill, pid=os.getpid(), numbers=(signal.SIGTERM, signal.SIGUSR1), write=os.write):
        for number in numbers:
            kill(pid, number)
        write(1, b"last")

sys.last = Last()
atexit.register(late)
with requeued_by_signals():
    with StopRequest(Topology(0, 1, 0, torch.device("cpu"))) as stop:
        if {first!r}:
            os.kill(os.getpid(), signal.{first or "SIGTERM"})
        assert stop.agreed() == bool({first!r})
    late()
late()
sys.exit(stop.exit_status)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (status, "last"), done.stderr


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
