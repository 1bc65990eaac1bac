"""Runs a function in several processes that are started like those of a run on one machine."""

import itertools
import multiprocessing.util
import os
import random
import socket
import tempfile
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from multiprocessing import get_context
from typing import Any

import torch

PATIENCE_S = 600.0
"""How long tests wait for processes, and these for each other: far longer than anything takes on a busy machine."""

_PORTS = range(10_000, 32_000)  # below those that Linux gives out by itself
_marks: list[socket.socket] = []


def run_processes(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """What `function(*args)` returned in each of `world_size` processes, by rank. It must stand in an importable module.

    The processes are forked from one that has done nothing but import, which takes seconds. The first error of one ends them
    all and is raised here: the others would wait for it.
    """
    _shorten_socket_paths()
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "deepspeed"])
    port = free_port()
    with ProcessPoolExecutor(world_size, mp_context=context) as pool:
        futures = [pool.submit(_run, function, rank, world_size, port, args) for rank in range(world_size)]
        ended, running = wait(futures, PATIENCE_S, FIRST_EXCEPTION)
        if running:
            for process in list(pool._processes.values()):
                process.kill()
    for future in ended:
        future.result()
    if running:
        raise TimeoutError(f"{function.__name__} took longer than {PATIENCE_S:g} s")
    return [future.result() for future in futures]


def free_port() -> int:
    """A port of this machine that nobody listens on, and that no other test is given as long as this process lives.

    One that the system chose and took back might be somebody else's by the time it is used. So these are ports that no
    system chooses, and a UDP socket marks those that are given, for the tests of other processes too.
    """
    first = random.SystemRandom().choice(_PORTS)
    for port in itertools.chain(range(first, _PORTS.stop), range(_PORTS.start, first)):
        mark = socket.socket(type=socket.SOCK_DGRAM)
        try:
            mark.bind(("127.0.0.1", port))
            with socket.socket() as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as stores of process groups do
                listener.bind(("", port))
        except OSError:
            mark.close()
            continue
        _marks.append(mark)
        return port
    raise OSError(f"no port of {_PORTS.start} to {_PORTS.stop - 1} is free")


def _shorten_socket_paths() -> None:
    """Lets the server that forks listen below /tmp: a socket's path has 107 characters at most, which a TMPDIR may fill."""
    before, tempfile.tempdir = tempfile.tempdir, "/tmp"
    try:
        multiprocessing.util.get_temp_dir()  # makes it once, and removes it in the end
    finally:
        tempfile.tempdir = before


def _run(function: Callable[..., Any], rank: int, world_size: int, port: int, args: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)  # OpenMP's threads of several processes keep each other from two cores
    places = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in places.items()})
    return function(*args)
