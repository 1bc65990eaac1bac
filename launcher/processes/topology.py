"""The processes of a run: how many there are, which one this is, its device, and the few things they agree on.

Runs as one plain process, under the `deepspeed` launcher, torchrun, srun or mpirun; gloo on CPU, nccl on CUDA. With tensor
parallelism over t processes, ranks 0 .. t - 1 hold one replica of the model, t .. 2t - 1 the next, and so on.
"""

import ctypes
import logging
import os
import platform
import socket
import sys
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from ...kernels.errors import RefusedError, UserError
from . import console

# Launchers that give every process a rank under names of their own, not as RANK, LOCAL_RANK and WORLD_SIZE.
_FOREIGN_RANKS = {
    "srun": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    "mpiexec": ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE"),  # of MPICH and Intel MPI
}

_MEETING = "meeting"  # key of the store that counts arrivals
_FIRST_POLL_S, _LAST_POLL_S = 0.001, 0.5
_LAST_RELEASES_S = 0.1

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # the names and numbers of glibc's malloc.h


@dataclass(frozen=True)
class Topology:
    """This process among the processes of the run. All methods but `is_main` and `say` are called by every process alike."""

    rank: int
    world_size: int
    local_rank: int
    """Number of this process on its machine."""
    device: torch.device
    tensor_parallel: int = 1
    """Processes that hold one replica of the model together."""
    tensor_group: dist.ProcessGroup | None = None
    """Those of this process's replica; None where it is alone."""
    data_group: dist.ProcessGroup | None = None
    """The processes that hold the same part of the model as this one, one of each replica; None where all processes do."""
    store: dist.Store | None = None
    """Where the processes found each other."""

    @property
    def is_main(self) -> bool:
        """True for the one process that prints and writes shared files."""
        return self.rank == 0

    @property
    def num_replicas(self) -> int:
        """Replicas of the model; they train on different samples."""
        return self.world_size // self.tensor_parallel

    @property
    def tensor_rank(self) -> int:
        """Number of this process in its replica."""
        return self.rank % self.tensor_parallel

    @property
    def replica(self) -> int:
        """Number of this process's replica."""
        return self.rank // self.tensor_parallel

    def say(self, text: str) -> None:
        """Print a line, on the main process alone."""
        if self.is_main:
            console.say(text)

    def barrier(self) -> None:
        """Return when every process has come here."""
        if self.world_size > 1:
            dist.barrier()

    def meet(self) -> None:
        """Return as `barrier` does, but however long it takes, and without keeping this process's signal handlers waiting."""
        if self.world_size == 1:
            return
        assert self.store is not None, "several processes have met in one"
        arrived = self.store.add(_MEETING, 1)
        everyone = self.world_size * -(-arrived // self.world_size)  # of this meeting and all before it
        pause_s = _FIRST_POLL_S
        while self.store.add(_MEETING, 0) < everyone:
            time.sleep(pause_s)
            pause_s = min(_LAST_POLL_S, 1.5 * pause_s)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the elementwise sum of `tensor` over the replicas, equal on each process; the argument is left as it is.

        tensor: equal on the processes of a replica.
        """
        total = tensor.detach().clone()
        if self.num_replicas > 1:
            dist.all_reduce(total, group=self.data_group)
        return total

    def broadcast(self, value: Any) -> Any:
        """Return the main process's `value`, a small picklable object, on every process."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def gather(self, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        """Return every process's `value`, small picklable objects, in order of rank, on every process.

        group: another one of all processes than that of the run.
        """
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=group)
        return values


def quiet(debug: bool) -> None:
    """Leave the terminal to the run's own lines: DeepSpeed logs errors only, known deprecations in its calls are dropped.

    debug: the opposite, DeepSpeed's full log. Call it before `start_processes`.
    """
    if debug:
        level = logging.DEBUG
    else:
        level = logging.ERROR
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.|deepspeed\.")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.|deepspeed\.")
        warnings.filterwarnings("ignore", category=UserWarning, module=r"deepspeed\.")
    _choose_accelerator()
    import deepspeed  # noqa: F401  makes its logger, whose level it sets

    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(level)
    for handler in logger.handlers:
        handler.setLevel(level)


def start_processes(hang_timeout_s: float, tensor_parallel: int = 1) -> Topology:
    """Return this process's place in the run, with the process groups up and DeepSpeed told of them.

    hang_timeout_s: a process that waits longer than this for another in a collective gives up. tensor_parallel: processes that
    hold one replica of the model together.
    Raises UserError if the launcher's environment is incomplete, or tensor_parallel does not divide the processes.
    """
    timeout = timedelta(seconds=hang_timeout_s)
    if dist.is_initialized():
        raise RuntimeError("a process group is already up: call stop_processes() before a second run in one process")
    # DeepSpeed makes groups without a timeout, and no argument reaches them: they take the defaults of this module,
    # half an hour of silence.
    distributed_c10d.default_pg_timeout = timeout  # type: ignore[misc]
    distributed_c10d.default_pg_nccl_timeout = timeout  # type: ignore[misc]

    rank, local_rank, world_size = _place(os.environ)
    if world_size % tensor_parallel:
        what = f"parallel.tensor={tensor_parallel} does not divide the {world_size} processes of the run"
        raise UserError(f"{what}; start a multiple of it")
    os.environ["LOCAL_RANK"] = str(local_rank)  # DeepSpeed insists on it
    _choose_accelerator()
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            what = f"process {rank} wants GPU {local_rank} of its machine, which has {torch.cuda.device_count()}"
            raise UserError(f"{what}; start at most as many processes per machine as it has GPUs")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"

    store = _store(os.environ, rank, world_size, timeout)
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if backend == "nccl" and world_size > 1 else None,
    )
    import deepspeed

    if device.type == "cpu":
        _switch_off_shared_memory_op()
        keep_freed_memory()
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
    tensor_group = data_group = None
    if tensor_parallel > 1:
        ranks = np.arange(world_size).reshape(-1, tensor_parallel)
        tensor_group, data_group = _own_group(ranks, rank), _own_group(ranks.T, rank)
    return Topology(rank, world_size, local_rank, device, tensor_parallel, tensor_group, data_group, store)


def _own_group(ranks: np.ndarray, rank: int) -> dist.ProcessGroup | None:
    """Return this process's group among groups of one row of `ranks` each, all of which every process must help to make."""
    groups = [dist.new_group(row.tolist()) for row in ranks]
    own: dist.ProcessGroup = groups[int(np.argwhere(ranks == rank)[0, 0])]
    return own


def stop_processes() -> None:
    """Take the process group down; without one nothing happens. After it `start_processes` may be called again.

    All processes wait for each other first, but where an error is on its way. DeepSpeed keeps its groups of ZeRO stage 3 for
    ever, and a thread of theirs that asks for Python's lock once Python ends aborts the process.
    """
    if not dist.is_initialized():
        return
    if sys.exception() is None:
        with suppress(RuntimeError):  # gloo's type: another process has failed, and says so itself
            dist.barrier()
        time.sleep(_LAST_RELEASES_S)  # without Python's lock, for threads that drop what they have sent
    # DeepSpeed's function, not torch's: it also forgets the groups that DeepSpeed keeps in module variables.
    import deepspeed.comm

    deepspeed.comm.destroy_process_group()


def device_name(device: torch.device) -> str:
    """Return the name of a GPU as its driver gives it, or `CPU, N threads`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} {'thread' if threads == 1 else 'threads'}"


def _place(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, local rank, world size) that the launcher gave this process; (0, 0, 1) when there was no launcher."""
    if "RANK" in environment:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    else:
        launcher = next((k for k, v in _FOREIGN_RANKS.items() if _number(environment, v[2]) > 1), None)
        if launcher is None:
            return 0, 0, 1
        # Without this check each process would take itself for the only one and write over the others' files.
        names = _FOREIGN_RANKS[launcher]
        for address in ("MASTER_ADDR", "MASTER_PORT"):
            if address not in environment:
                what = f"{launcher} started {environment[names[2]]} processes that must find each other"
                remedy = "export MASTER_ADDR (name of the first machine) and MASTER_PORT (a free port there)"
                raise UserError(f"{address} is not set, and {what}; {remedy}")
    meeting = ("MASTER_ADDR", "MASTER_PORT") if _number(environment, names[2]) > 1 else ()
    for name in (*names, *meeting):
        if name not in environment:
            remedy = "start with `deepspeed`, torchrun or one process"
            raise UserError(f"{name} is not set although {names[0]} is; {remedy}")
    rank, local_rank, world_size = (_number(environment, name) for name in names)
    if rank >= world_size:
        rule = f"must be below {names[2]}, which is {world_size}; leave both to the launcher"
        raise UserError(f"environment variable {names[0]} is {rank}, {rule}")
    return rank, local_rank, world_size


def _number(environment: Mapping[str, str], name: str) -> int:
    """Return the value of a variable that a launcher sets, 1 without it."""
    text = environment.get(name, "1")
    if not text.isdecimal():
        raise UserError(f"environment variable {name} is {text!r}, must be a whole number; leave it to the launcher")
    return int(text)


def _store(environment: Mapping[str, str], rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """Return where the processes find each other. Raises RefusedError if they do not."""
    if world_size == 1 and not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        return dist.HashStore()  # no port: two runs on one machine cannot collide
    host, port = environment["MASTER_ADDR"].strip(), _number(environment, "MASTER_PORT")
    if not host:
        raise UserError("environment variable MASTER_ADDR is empty, must be the name of the first machine; set it")
    if not 1 <= port <= 65535:
        raise UserError(f"environment variable MASTER_PORT is {port}, must be from 1 to 65535; give a free port")
    try:
        if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun keeps one store over its restarts: without a prefix the restarted processes read dead addresses.
            attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
            return dist.PrefixStore(f"attempt{attempt}", dist.TCPStore(host, port, is_master=False, timeout=timeout))
        return dist.TCPStore(host, port, world_size, is_master=rank == 0, timeout=timeout)
    except dist.DistError as error:
        said = str(error).splitlines()[0].rstrip(".")
        try:
            socket.getaddrinfo(host, port)  # only now: a name may need some seconds to become known
        except (OSError, UnicodeError):
            said = f"there is no machine of the name {host}"
        remedy = "give the name of the first machine and a free port there, and start all processes"
        what = f"the processes cannot meet at MASTER_ADDR {host}, MASTER_PORT {port}: {said}"
        raise RefusedError(f"{what}; {remedy}") from error


def _choose_accelerator() -> None:
    """Name the CPU to DeepSpeed where there is no GPU: its own search prints a warning to stdout."""
    if "deepspeed" not in sys.modules and not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def keep_freed_memory() -> None:
    """Have the C library reuse the memory of freed tensors in place of handing it back to the system.

    A step frees and asks for the same large buffers again and again, and the system clears every page of a fresh one: on two
    cores that took a third of gpt_tiny's time. Nothing happens where the C library is not glibc.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, 2**30)  # bytes
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _switch_off_shared_memory_op() -> None:
    """Keep DeepSpeed on gloo: its own CPU op is compiled at the first start, which needs a compiler and a minute.

    Raises UserError if this DeepSpeed has no switch for it.
    """
    import deepspeed.ops

    compatible = getattr(deepspeed.ops, "__compatible_ops__", None)
    if not isinstance(compatible, dict):
        what = "no deepspeed.ops.__compatible_ops__, by which its compiled CPU op is switched off"
        raise UserError(f"DeepSpeed {deepspeed.__version__} has {what}; install deepspeed 0.19")
    compatible["deepspeed_shm_comm"] = False
