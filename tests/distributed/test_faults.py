"""Two processes, one of which is slow, hangs or dies; signals to one of them only."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.runs import losses, metrics, write_config
from helpers.spawn import free_port

WORKER = Path(__file__).with_name("workers") / "faults.py"
HANG_TIMEOUT_S = 8.0


class Pair:
    """The two processes of a run; their output is in files, which nobody must read in time."""

    def __init__(self, config: Path, fault: str = "none") -> None:
        self.run = config.parent / "runs" / "run"
        port = free_port()
        self.errors = [config.parent / f"{fault}{port}-{rank}.err" for rank in range(2)]
        self.processes = []
        for rank in range(2):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
            environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", **{k: str(v) for k, v in variables.items()}}
            with self.errors[rank].open("wb") as err:
                command = [sys.executable, str(WORKER), str(config), fault]
                self.processes.append(subprocess.Popen(command, stdout=err, stderr=err, env=environment))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def wait_until(self, holds, timeout_s: float = 100) -> None:
        deadline = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < deadline, self.texts()
            assert all(process.poll() is None for process in self.processes), self.texts()
            time.sleep(0.05)

    def steps(self) -> int:
        """Steps that are logged."""
        return max(losses(self.run), default=0) if (self.run / "metrics.jsonl").exists() else 0

    def texts(self) -> list[str]:
        return [path.read_text() for path in self.errors]

    def log(self, rank: int) -> str:
        return (self.run / "log" / f"rank{rank}.log").read_text()

    def heartbeats(self) -> list[Path]:
        return sorted((self.run / "log" / "heartbeats").glob("*.json"))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(
        tmp_path_factory.mktemp("faults"),
        training__max_steps=100_000,
        schedule__type="constant",
        schedule__total_steps=None,
        reliability__hang_timeout_s=HANG_TIMEOUT_S,
        # A save takes as long as it likes, so a hang in one is told in other words: none comes but where a test asks for it.
        checkpoint__save_every_steps=100_000,
    )


def test_a_signal_to_one_process_ends_the_preparation_of_data_on_another(config):
    with Pair(config, "prepare") as pair:
        pair.wait_until(lambda: "preparing" in pair.texts()[0])
        pair.wait_until(lambda: len(pair.heartbeats()) == 2)
        pair.processes[1].send_signal(signal.SIGUSR1)  # waits for process 0
        assert [process.wait(timeout=30) for process in pair.processes] == [75, 75], pair.texts()
    assert "stopped before the first step; nothing was trained" in pair.texts()[0]


def test_a_signal_to_one_process_just_after_another_prepared_the_data_ends_both(config):
    with Pair(config, "told") as pair:
        assert [process.wait(timeout=60) for process in pair.processes] == [75, 75], pair.texts()
    assert "stopped before the first step; nothing was trained" in pair.texts()[0]


def test_a_process_that_ends_alone_before_the_first_step_is_named_and_not_waited_for(config):
    with Pair(config, "alone") as pair:
        assert pair.processes[1].wait(timeout=60) == 0, pair.texts()
        assert pair.processes[0].wait(timeout=60) == 1, pair.texts()
    assert "the run hangs: rank 1 has left the run alone" in pair.texts()[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_defect_in_one_process_ends_both_with_one_traceback(rank, tmp_path):
    with Pair(write_config(tmp_path), f"defect{rank}") as pair:
        assert [process.wait(timeout=60) for process in pair.processes] == [1, 1], pair.texts()
    own, other = pair.texts()[rank], pair.texts()[1 - rank]
    assert own.count("ValueError: not the user's mistake") == 1 and "in defective" in own
    note = "this is a fault of xformer-train; please report it with the traceback above"
    assert own.splitlines()[-1] == f"error (rank {rank}): {note}"
    assert "Traceback" not in other and "error" not in other
    assert pair.log(rank).count("Traceback") == 1
    assert "Traceback" not in pair.log(1 - rank)


def test_a_slow_process_is_named_and_a_signal_to_it_stops_both_after_one_save(config):
    with Pair(config, "slow") as pair:
        pair.wait_until(lambda: "rank 1 on" in pair.texts()[0])
        pair.processes[1].send_signal(signal.SIGUSR1)
        assert [process.wait(timeout=60) for process in pair.processes] == [75, 75], pair.texts()
    assert "is slow: it needs 0." in pair.texts()[0]
    assert "rank 0 on" not in pair.texts()[0]
    saved = [path.name for path in (pair.run / "checkpoints").glob("step*")]
    assert saved == [f"step{max(losses(pair.run)):08d}"]


def test_a_stopped_process_is_named_by_the_others_which_leave_their_stacks(config):
    with Pair(config) as pair:
        before = pair.steps()
        pair.wait_until(lambda: pair.steps() > before + 3)
        pair.processes[1].send_signal(signal.SIGSTOP)
        stopped_s = time.monotonic()
        assert pair.processes[0].wait(timeout=60) == 1
        print(f"ended after {time.monotonic() - stopped_s:.1f} s")
    text = pair.texts()[0]
    assert "the run hangs: no progress for " in text and "s (reliability.hang_timeout_s is 8)" in text
    assert (
        f"(pid {pair.processes[1].pid}) was killed or stopped from outside, or its machine is gone: last heard of at step"
        in text
    )
    assert f"  rank 0 on {os.uname().nodename} (pid {pair.processes[0].pid}): step " in text
    assert "waits in " in text
    assert "giving up: no progress" in pair.log(0)
    assert "Thread 0x" in pair.log(0) and "in train" in pair.log(0)


def test_a_process_that_is_stopped_in_a_save_is_named_though_a_save_may_take_as_long_as_it_likes(config):
    with Pair(config, "save") as pair:
        before = pair.steps()
        pair.wait_until(lambda: pair.steps() > before)
        pair.processes[0].send_signal(signal.SIGUSR1)
        assert pair.processes[0].wait(timeout=60) == 1
    text = pair.texts()[0]
    assert "the run hangs: rank 1 has not been heard of for 5.6 s (reliability.hang_timeout_s is 8)" in text
    assert f"rank 1 on {os.uname().nodename} (pid {pair.processes[1].pid}) was killed or stopped from outside" in text


def test_a_process_that_hangs_in_python_is_named_with_its_line(config):
    with Pair(config, "hang") as pair:
        assert [process.wait(timeout=100) for process in pair.processes] == [1, 1], pair.texts()
    text = pair.texts()[0] + pair.texts()[1]
    assert text.count("the run hangs") == 1, "one process speaks"
    assert "is in for_ever (workers/faults.py:" in text
    assert "the others wait for rank 1" in text
    assert "waits in all_reduce (processes/topology.py:" in text
    assert "for_ever" in pair.log(1)


def test_a_killed_process_is_named_at_once(config):
    with Pair(config) as pair:
        before = pair.steps()
        pair.wait_until(lambda: pair.steps() > before + 3)
        pair.processes[1].kill()
        assert pair.processes[0].wait(timeout=60) == 1
    text = pair.texts()[0]
    assert f"rank 1 on {os.uname().nodename} (pid {pair.processes[1].pid}) was killed or stopped from outside" in text
    assert "error (rank 0): rank 1 on" in text and "Traceback" not in text
    assert [row for row in metrics(pair.run) if row["step"] == 1], "all the runs are one"
