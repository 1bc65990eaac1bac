"""Time an all-reduce over the processes of a run.

Under a launcher: `python -m xformer_train.launcher.machines.doctor_bandwidth FILE`.

The main process writes {"seconds", "bytes", "processes", "backend"} to FILE, JSON.
"""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

_LIMIT = timedelta(seconds=60)
_BYTES = {"gloo": 2**24, "nccl": 2**28}
_REPEATS = 5


def measure() -> dict[str, float | str]:
    """Return the seconds of an all-reduce, the fastest of five, and its bytes of fp32; every process of the group calls it."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=_LIMIT)
    try:
        values = torch.ones(_BYTES[backend] // 4, device=device)
        seconds = min(_timed_all_reduce(values) for _ in range(_REPEATS))
        return {"seconds": seconds, "bytes": _BYTES[backend], "processes": dist.get_world_size(), "backend": backend}
    finally:
        dist.destroy_process_group()


def _timed_all_reduce(values: torch.Tensor) -> float:
    dist.barrier()
    if values.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    dist.all_reduce(values)
    if values.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    from ..processes.rank_status import recorded

    with recorded():
        measured = measure()
        if os.environ["RANK"] == "0":
            Path(sys.argv[1]).write_text(json.dumps(measured))
