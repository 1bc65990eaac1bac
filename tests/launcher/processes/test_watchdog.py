"""What the heartbeats of a run tell: who is slow, who is gone, who keeps the others waiting."""

import threading

import pytest
import torch
import torch.distributed as dist

from xformer_train.launcher.processes import watchdog
from xformer_train.launcher.processes.signals import StopRequest
from xformer_train.launcher.processes.topology import Topology
from xformer_train.launcher.processes.watchdog import Heartbeat, Watchdog, collective_timeout_s


def beat(rank, *, steps=0, step_s=0.0, own_s=0.0, where="", state="running"):
    return Heartbeat(rank, f"host{rank}", 100 + rank, 1, state, steps, "forward", 1.0, where, 0, steps, step_s, own_s)


def test_a_slow_process_is_named_once_while_it_is_slow():
    slow = watchdog._SlowProcesses()

    def window(number, own_of_1):
        """Heartbeats after `number` windows of 10 steps of 1 s each."""
        own = {0: 2.0, 1: own_of_1, 2: 2.5}
        return slow.news({r: beat(r, steps=10 * number, step_s=10.0 * number, own_s=own[r] * number) for r in own})

    assert window(1, 2.0) == []  # nothing to compare with yet
    assert window(2, 2.0) == []
    (text,) = slow.news({r: beat(r, steps=30, step_s=30.0, own_s=s) for r, s in ((0, 6.0), (1, 12.0), (2, 7.5))})
    assert text.startswith("rank 1 on host1 is slow: it needs 0.800 s of a step of 1.000 s")
    assert "the others 0.225 s, and they wait for it" in text
    assert slow.news({r: beat(r, steps=35, step_s=35.0, own_s=s) for r, s in ((0, 7.0), (1, 16.0), (2, 9.0))}) == []
    assert slow.news({r: beat(r, steps=40, step_s=40.0, own_s=s) for r, s in ((0, 8.0), (1, 20.0), (2, 10.0))}) == []


def test_a_difference_that_is_little_of_a_step_is_no_slowness():
    slow = watchdog._SlowProcesses()
    for number in range(3):
        beats = {r: beat(r, steps=10 * number, step_s=10.0 * number, own_s=s * number) for r, s in ((0, 0.1), (1, 1.0))}
        assert slow.news(beats) == []


def test_collectives_wait_longer_than_the_watchdog_which_can_say_more():
    assert all(collective_timeout_s(seconds) > 1.2 * seconds for seconds in (1.0, 600.0))


@pytest.mark.parametrize(
    "error", [dist.DistBackendError("x"), RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed")]
)
def test_errors_of_collectives_are_known(error):
    assert watchdog._is_peer_error(error)
    assert not watchdog._is_peer_error(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_alone_it_starts_no_thread(tmp_path):
    alone = Topology(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    with Watchdog(alone, 1.0, StopRequest(alone)) as watching:
        watching.start(tmp_path, forward_is_own=True)
        watching.at("data", 1)
        assert "watchdog" not in {thread.name for thread in threading.enumerate()}
    assert list(tmp_path.iterdir()) == []


def test_the_place_of_a_thread_is_its_collective_or_its_line():
    def all_reduce():
        return watchdog.sys._current_frames()[threading.get_ident()]

    assert watchdog._collective(all_reduce()) == ""
    code = compile("def all_reduce(inner):\n    return inner()\n", "/x/torch/distributed/distributed_c10d.py", "exec")
    names = {}
    exec(code, names)
    assert watchdog._collective(names["all_reduce"](all_reduce)).startswith(
        "waits in all_reduce (processes/test_watchdog.py:"
    )
