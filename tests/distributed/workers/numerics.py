"""Whole runs, in which the numbers of one process go wrong at some steps."""

import contextlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from xformer_train.launcher.config.loading import load_config
from xformer_train.launcher.processes.topology import quiet
from xformer_train.launcher.training import loop
from xformer_train.launcher.training.train import run

BROKEN = "layers.1"  # the module whose output is not finite


def numerics_worker(runs: Sequence[tuple[Path, Sequence[str], Sequence[int], int]]) -> list[str]:
    """What each run printed, and what it raised, on this process.

    runs: (config file, --set arguments, how often the engine has stepped when the numbers of the last process break, port).
    """
    quiet(debug=False)
    world_size = int(os.environ["WORLD_SIZE"])
    is_last = os.environ["RANK"] == str(world_size - 1)
    right, printed = loop.train_step, []
    for path, sets, bad_steps, port in runs:
        os.environ["MASTER_PORT"] = str(port)
        loop.train_step = _breaking(right, bad_steps if is_last else ())
        out = io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                run(load_config(path, sets, world_size=world_size), resume=True)
        except ValueError as error:
            out.write(f"{type(error).__name__}: {error}")
        finally:
            loop.train_step = right
        printed.append(out.getvalue())
    return printed


def _breaking(right: Any, bad_steps: Sequence[int]) -> Any:
    """`train_step` whose later calls, counted from 0, break: the hook stays until the next call, for what repeats the step."""
    calls, hooks = [], []

    def train_step(engine: Any, *args: Any) -> Any:
        while hooks:
            hooks.pop().remove()
        if len(calls) in bad_steps:
            (module,) = [module for name, module in engine.module.named_modules() if name == BROKEN]
            hooks.append(module.register_forward_hook(lambda module, inputs, output: output + torch.inf))
        calls.append(engine)
        return right(engine, *args)

    return train_step
