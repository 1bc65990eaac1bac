"""One process of a run in which something may be wrong: `faults_worker.py CONFIG FAULT`, with a launcher's variables set.

FAULT: none; slow: the data of process 1 take 0.2 s longer; prepare: preparing data takes a minute; hang: process 1 never
comes back from the sixth setting of a learning rate; save: process 1 is stopped from outside as it begins to save; defect0
and defect1: preparing data meets a defect in that process; told: process 1 gets SIGTERM once process 0 has prepared the data;
alone: process 1 ends, as if all was well, where the others wait for it.
"""

import os
import signal
import sys
import time

from xformer_train.launcher.commands.errors import reported_errors, reported_faults
from xformer_train.launcher.config.loading import load_config
from xformer_train.launcher.processes.rank_status import recorded
from xformer_train.launcher.processes.signals import StopAsked, StopRequest
from xformer_train.launcher.processes.topology import quiet
from xformer_train.launcher.training import loop
from xformer_train.launcher.training import prepare as setup
from xformer_train.launcher.training.train import run


def main() -> int:
    path, fault = sys.argv[1:]
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    read_step, prepare_data = loop.read_step, setup.prepare_data

    def slowly(*args):
        time.sleep(0.2)
        return read_step(*args)

    def for_a_minute(*args, **kwargs):
        print("preparing", flush=True)
        for _ in range(600):
            time.sleep(0.1)
        return prepare_data(*args, **kwargs)

    set_learning_rate, calls = loop.set_learning_rate, []

    def for_ever(*args):
        calls.append(args)
        while len(calls) > 5:
            time.sleep(1000)
        return set_learning_rate(*args)

    save = loop._save

    def stopped(*args):
        os.kill(os.getpid(), signal.SIGSTOP)
        return save(*args)

    def defective(*args, **kwargs):
        if fault == f"defect{rank}":
            raise ValueError("not the user's mistake")
        return prepare_data(*args, **kwargs)

    agreed = setup.agreed

    def then_told(topology, task):
        result = agreed(topology, task)
        if task is None:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    def end_alone(*args):
        StopRequest.agreed_now = lambda stop: True
        raise StopAsked

    if fault == "alone" and rank == 1:
        setup._open_data = end_alone
    if fault.startswith("defect"):
        setup.prepare_data = defective
    if fault == "told" and rank == 1:
        setup.agreed = then_told
    if fault == "save" and rank == 1:
        loop._save = stopped
    if fault == "hang" and rank == 1:
        loop.set_learning_rate = for_ever
    if fault == "slow" and rank == 1:
        loop.read_step = slowly
    if fault == "prepare":
        setup.prepare_data = for_a_minute
    quiet(debug=False)
    return run(load_config(path, world_size=world_size), resume=True)


if __name__ == "__main__":
    with recorded(), reported_faults(), reported_errors(debug=False):
        sys.exit(main())
