"""Whole runs in this process, quiet, and whether two of them are the same."""

from pathlib import Path

import torch

from xformer_train.launcher.config.loading import load_config
from xformer_train.launcher.processes.topology import quiet

from .runs import losses, weights

quiet(debug=False)

from xformer_train.launcher.training.train import run  # noqa: E402 - DeepSpeed is quiet only when told before


def start(path: Path, *sets: str, resume: bool = False) -> None:
    """Train what the config at `path` says, with `sets` changed."""
    run(load_config(path, list(sets)), resume=resume)


def assert_same_run(folder: Path, straight: str, resumed: str, step: int) -> None:
    """The two run directories under folder/runs hold the same losses, and the same weights in the checkpoint of `step`."""
    assert losses(folder / "runs" / straight) == losses(folder / "runs" / resumed)
    checkpoint_id = f"step{step:08d}"
    ours = weights(folder / "runs" / straight / "checkpoints" / checkpoint_id)
    theirs = weights(folder / "runs" / resumed / "checkpoints" / checkpoint_id)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
