"""Write what a run measured for TensorBoard."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .record import StepRecord


class Boards:
    """TensorBoard series: by step in tb/, by samples in tb/samples/.

    A resumed writer hides what lies at or after its first x, whatever the tag, so series with another x need a writer of
    their own.
    """

    def __init__(self, directory: Path, start_step: int, start_samples: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # imports tensorboard, which takes seconds

        self._by_step = SummaryWriter(str(directory), purge_step=start_step + 1)
        self._by_samples = SummaryWriter(str(directory / "samples"), purge_step=start_samples + 1)

    def add_step(self, record: StepRecord, rates: Mapping[str, float | None]) -> None:
        self._by_samples.add_scalar("Train/Samples/train_loss", record.loss, record.samples)
        self._by_samples.add_scalar("Train/Samples/lr", record.lr, record.samples)
        series = {"loss": record.loss, **record.losses, "lr": record.lr, "grad_norm": record.grad_norm}
        series |= {"loss_scale": record.loss_scale, "memory_gib": record.memory_gib}
        for name, value in series.items():
            if value is not None:
                self._by_step.add_scalar(f"Train/{name}", value, record.step)
        for name, value in rates.items():
            if value is not None:
                self._by_step.add_scalar(f"Throughput/{name}", value, record.step)
        for name, figures in record.histograms.items():
            self._by_step.add_histogram(f"Train/{name}", np.asarray(figures), record.step)
        self._flush()

    def add_evaluation(self, step: int, losses: Mapping[str, float]) -> None:
        for name, value in losses.items():
            self._by_step.add_scalar("Validation/Loss" if name == "loss" else f"Validation/{name}", value, step)
        self._flush()

    def close(self) -> None:
        self._by_step.close()
        self._by_samples.close()

    def _flush(self) -> None:
        """Write all points into the files: the writers alone may hold them back for two minutes."""
        self._by_step.flush()
        self._by_samples.flush()
