"""Runs a function in several processes that are started like those of a run on one machine."""

import os
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch


def run_processes(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 100) -> list[Any]:
    """What `function(*args)` returned in each of `world_size` processes, by rank. It must stand in an importable module.

    The processes are forked from one that has done nothing but import, which takes seconds.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "deepspeed"])
    port = free_port()
    with ProcessPoolExecutor(world_size, mp_context=context) as pool:
        futures = [pool.submit(_run, function, rank, world_size, port, args) for rank in range(world_size)]
        return [future.result(timeout=timeout_s) for future in futures]


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


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
