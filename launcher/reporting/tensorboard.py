"""Write what a run measured for TensorBoard."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .record import StepRecord

_BY_SAMPLES = "Train/Samples/"  # series whose x is samples; that of all others is steps
_HPARAMS = "_hparams_/"


class Boards:
    """TensorBoard series of a run, in one folder, so that TensorBoard has one entry for it.

    hparams: the run config by dotted key, for TensorBoard's page of that name.
    A resumed run writes the points of later steps again, so those of the start before are taken out of its files: TensorBoard's
    own way to hide them knows one x for all series.
    """

    def __init__(
        self, directory: Path, start_step: int, start_samples: int, hparams: Mapping[str, bool | int | float | str]
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter  # imports tensorboard, which takes seconds
        from torch.utils.tensorboard.summary import hparams as summaries

        for path in sorted(directory.glob("*tfevents*")):
            _drop_points_after(path, start_step, start_samples)
        self._writer = SummaryWriter(str(directory))
        assert self._writer.file_writer is not None, "SummaryWriter opens its file at once"
        for summary in summaries(dict(hparams), {"Train/loss": 0.0, "Validation/Loss": 0.0}):
            self._writer.file_writer.add_summary(summary)

    def add_step(self, record: StepRecord, rates: Mapping[str, float | None]) -> None:
        self._writer.add_scalar(f"{_BY_SAMPLES}train_loss", record.loss, record.samples)
        self._writer.add_scalar(f"{_BY_SAMPLES}lr", record.lr, record.samples)
        series = {"loss": record.loss, **record.losses, "lr": record.lr, "grad_norm": record.grad_norm}
        series |= {"loss_scale": record.loss_scale, "memory_gib": record.memory_gib}
        for group, figures_of in (("Train", series), ("Throughput", rates)):
            for name, value in figures_of.items():
                if value is not None:
                    self._writer.add_scalar(f"{group}/{name}", value, record.step)
        for name, figures in record.histograms.items():
            self._writer.add_histogram(f"Train/{name}", np.asarray(figures), record.step)
        self._writer.flush()  # to the files: the writer alone may hold points back for two minutes

    def add_evaluation(self, step: int, losses: Mapping[str, float]) -> None:
        for name, value in losses.items():
            self._writer.add_scalar("Validation/Loss" if name == "loss" else f"Validation/{name}", value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _drop_points_after(path: Path, step: int, samples: int) -> None:
    """Replace a file of events in one move by one without later points and without what is cut short."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    partial = path.with_name("resumed.partial")  # a name that TensorBoard does not read
    with partial.open("wb") as file:
        writer = RecordWriter(file)
        for raw in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(raw)
            tags = [value.tag for value in event.summary.value]
            limit = samples if any(tag.startswith(_BY_SAMPLES) for tag in tags) else step
            if not tags or (event.step <= limit and not any(tag.startswith(_HPARAMS) for tag in tags)):
                writer.write(raw)
    partial.replace(path)
