"""Whole runs one after the other in the same processes: starting those takes longer than such a run."""

import contextlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

from xformer_train.launcher.config.loading import load_config
from xformer_train.launcher.processes.topology import quiet
from xformer_train.launcher.training.train import run


def runs_worker(world_size: int, runs: Sequence[tuple[Path, Sequence[str], bool, int]]) -> list[str]:
    """What each run printed, or `ValueError: ...`.

    runs: (config file, --set arguments, whether to resume, port): one port may not be used twice at once.
    """
    quiet(debug=False)
    printed = []
    for path, sets, resume, port in runs:
        os.environ["MASTER_PORT"] = str(port)
        out = io.StringIO()
        try:
            with contextlib.redirect_stdout(out):
                run(load_config(path, sets, world_size=world_size), resume=resume)
        except ValueError as error:
            out.write(f"ValueError: {error}")
        except SystemExit:
            out.write("another process failed")
        printed.append(out.getvalue())
    return printed
