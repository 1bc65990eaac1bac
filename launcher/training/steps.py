"""One optimizer step and one evaluation: what is done with the samples of a step."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...recipes.data.stream import SampleStream
from ...recipes.recipe import Batch
from ..config.batch import BatchPlan
from ..processes.topology import Topology


@dataclass(frozen=True)
class StepData:
    """This replica's share of one step."""

    micro_batches: Sequence[Batch]
    counts: dict[str, int]
    """Terms of each part of the loss."""
    real_tokens: int


@dataclass(frozen=True)
class StepResult:
    """What one step computed, over all replicas; tensors on the device, so that nobody waits for them unread."""

    sums: dict[str, Tensor]
    """This replica's summed loss of each part, fp32 scalars."""
    totals: Tensor
    """Terms of each part over all replicas, then the real tokens, fp64 (parts + 1,)."""


def step_positions(first: int, batch: BatchPlan, replica: int) -> list[np.ndarray]:
    """Return the positions of each micro-batch of one replica of the model, (micro_batch_size,) int64 each.

    first: position of the first sample of the step. Replicas take consecutive blocks, so the samples of a step are the
    same whatever the number of processes.
    """
    share = batch.micro_batch_size * batch.gradient_accumulation_steps
    start = first + replica * share
    return list(np.arange(start, start + share, dtype=np.int64).reshape(-1, batch.micro_batch_size))


def read_step(
    stream: SampleStream,
    positions: list[np.ndarray],
    loss_counts: Callable[[Batch], dict[str, int]],
    real_tokens: Callable[[Batch], int],
) -> StepData:
    """Return the micro-batches at these positions and what the step must know about them; runs in the loader's thread."""
    micro_batches = [stream.batch(micro) for micro in positions]
    counts: Counter[str] = Counter()
    for micro_batch in micro_batches:
        counts.update(loss_counts(micro_batch))
    if torch.cuda.is_available():  # copies to the GPU overlap with compute only from pinned memory
        micro_batches = [{name: value.pin_memory() for name, value in one.items()} for one in micro_batches]
    return StepData(micro_batches, counts, sum(real_tokens(one) for one in micro_batches))


def train_step(
    engine: Any,
    data: StepData,
    topology: Topology,
    at: Callable[[str], None] = lambda phase: None,
    end_micro_batch: Callable[[], Any] | None = None,
) -> StepResult:
    """Run forward and backward of every micro-batch, then one optimizer step.

    The loss of the step is, over parts, sum / count with the counts of all replicas and micro-batches. If it is not finite,
    neither is the gradient, and the engine leaves the step out. DeepSpeed averages gradients over replicas and micro-batches,
    hence the division by their number here.
    at: called with the name of each phase. end_micro_batch: called after each micro-batch in the place of the engine's step.
    """
    at("counts")
    parts = list(data.counts)
    own = torch.tensor([*data.counts.values(), data.real_tokens], dtype=torch.float64).to(topology.device)
    totals = topology.sum(own)
    norms = (totals[:-1].clamp(min=1) / (topology.num_replicas * len(data.micro_batches))).float()
    sums: dict[str, Tensor] = {}
    for micro_batch in data.micro_batches:
        at("forward")
        losses: Mapping[str, Tensor] = engine(**_on_device(micro_batch, topology.device))
        at("backward")
        total: Any = sum(losses[part] / norm for part, norm in zip(parts, norms.unbind(), strict=True))
        # An infinite loss may have a finite gradient, and every process looks at the gradient only.
        engine.backward(total * torch.where(total.detach().isfinite(), 1.0, torch.nan))
        at("optimizer")
        (end_micro_batch or engine.step)()
        for part, loss in losses.items():
            sums[part] = sums.get(part, torch.zeros_like(loss)) + loss.detach()
    return StepResult(sums, totals)


def mean_losses(result: StepResult, topology: Topology) -> dict[str, float]:
    """Return the step's loss by part, averaged over all replicas, NaN for a part without terms; waits for the device."""
    sums = topology.sum(torch.stack([result.sums[part] for part in result.sums]).double())
    means = sums / result.totals[:-1]
    return dict(zip(result.sums, means.tolist(), strict=True))


def evaluate(
    engine: Any,
    stream: SampleStream,
    loss_counts: Callable[[Batch], dict[str, int]],
    batch: BatchPlan,
    topology: Topology,
    most_batches: int | None,
    goes_on: Callable[[], bool] = lambda: True,
) -> dict[str, float] | None:
    """Return the mean validation loss by part, NaN for one without terms.

    It is over the first pass of the stream: the same samples with the same masks each time.

    goes_on: asked before each micro-batch, with the same answer on every process; None is returned once it is False.
    most_batches: look at no more micro-batches per replica. Every replica runs the model equally often, which ZeRO stage 3
    needs; one that is out of samples repeats the first and does not count it.
    """
    micro, replicas = batch.micro_batch_size, topology.num_replicas
    totals: dict[str, Tensor] = {}
    engine.eval()
    with torch.no_grad():
        for index in range(evaluation_rounds(stream, batch, topology, most_batches)):
            if not goes_on():
                engine.train()
                return None
            start = (index * replicas + topology.replica) * micro
            positions = np.arange(start, min(start + micro, stream.num_samples), dtype=np.int64)
            samples = stream.batch(positions if len(positions) else np.zeros(1, dtype=np.int64))
            losses = engine(**_on_device(samples, topology.device))
            for part, count in loss_counts(samples).items():
                seen = torch.stack([losses[part].double(), torch.tensor(count, device=topology.device).double()])
                totals[part] = totals.get(part, torch.zeros_like(seen)) + (seen if len(positions) else 0 * seen)
    engine.train()
    whole = topology.sum(torch.stack(list(totals.values())))  # (parts, 2)
    return dict(zip(totals, (whole[:, 0] / whole[:, 1]).tolist(), strict=True))


def evaluation_rounds(stream: SampleStream, batch: BatchPlan, topology: Topology, most_batches: int | None) -> int:
    """Return the micro-batches of each replica in an evaluation."""
    rounds = -(-stream.num_samples // (batch.micro_batch_size * topology.num_replicas))
    return rounds if most_batches is None else min(rounds, most_batches)


def _on_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}
