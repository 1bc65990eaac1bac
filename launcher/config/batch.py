"""Batch arithmetic: train_batch_size = micro_batch_size * gradient_accumulation_steps * replicas. Torch-free.

A replica is one copy of the model: a process, or with tensor parallelism the processes that share it.
"""

from dataclasses import dataclass
from math import isqrt

from ...kernels.errors import UserError
from .schema import TrainingConfig


@dataclass(frozen=True)
class BatchPlan:
    """How the sequences of one optimizer step are divided; always consistent when it comes from `solve_batch`."""

    train_batch_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    num_replicas: int


def solve_batch(training: TrainingConfig, num_replicas: int) -> BatchPlan:
    """Return the batch of a run with `num_replicas` replicas of the model.

    Any two of the three keys give the third. One alone leaves gradient_accumulation_steps at 1. Raises UserError, with
    the nearest consistent values, when the keys contradict each other, and when neither batch size is given.
    """
    train, micro = training.train_batch_size, training.micro_batch_size
    steps = training.gradient_accumulation_steps
    if train is None and micro is None:
        whole = "training.train_batch_size (sequences per step, over all replicas of the model)"
        part = "training.micro_batch_size (sequences per forward pass of one replica)"
        raise UserError(f"training.train_batch_size: no batch size is given; give {whole} or {part}, or both")
    steps = steps or (train // (micro * num_replicas) if train and micro else 1)
    micro = micro or (train or 0) // (steps * num_replicas)
    plan = BatchPlan(micro * steps * num_replicas, micro, steps, num_replicas)
    if train not in (None, plan.train_batch_size):
        raise UserError(_contradiction(training, num_replicas))
    return plan


def batch_of_step(training: TrainingConfig, whole: BatchPlan, step: int) -> BatchPlan:
    """Return the batch of a step, counted from the first one: `whole`, or less of it during training.batch_warmup_steps."""
    first, steps = training.batch_warmup_from, training.batch_warmup_steps
    if first is None or steps is None or step >= steps:
        return whole
    unit = whole.micro_batch_size * whole.num_replicas
    micro_batches = first // unit + (whole.train_batch_size - first) // unit * step // steps
    return BatchPlan(unit * micro_batches, whole.micro_batch_size, micro_batches, whole.num_replicas)


def _contradiction(training: TrainingConfig, num_replicas: int) -> str:
    train, micro = training.train_batch_size, training.micro_batch_size
    accumulation = training.gradient_accumulation_steps
    assert train is not None, "a contradiction needs a train_batch_size"
    given = {"micro_batch_size": micro, "gradient_accumulation_steps": accumulation}
    factors = [f"{key} {value}" for key, value in given.items() if value is not None]
    replicas = f"{num_replicas} {'replica' if num_replicas == 1 else 'replicas'}"
    needs = "must be a multiple of" if factors or num_replicas > 1 else "must be"
    if micro and accumulation:
        needs = f"must be {micro * accumulation * num_replicas}, which is"
    choices = "; ".join(
        f"{plan.train_batch_size} = {plan.micro_batch_size} x {plan.gradient_accumulation_steps} x {num_replicas}"
        for plan in nearest_plans(training, num_replicas)
    )
    return (
        f"training.train_batch_size: got {train}, {needs} {' times '.join([*factors, replicas])}; nearest that fit "
        f"(train_batch_size = micro_batch_size x gradient_accumulation_steps x replicas of the model): {choices}"
    )


def nearest_plans(training: TrainingConfig, num_replicas: int) -> list[BatchPlan]:
    """Return consistent plans near a contradictory one, each of which changes as few of the given keys as it can.

    First those that keep train_batch_size, where the number of replicas divides it, then its nearest multiples.
    """
    train, micro = training.train_batch_size, training.micro_batch_size
    accumulation = training.gradient_accumulation_steps
    assert train is not None, "a contradiction needs a train_batch_size"
    plans: list[BatchPlan] = []
    if train % num_replicas == 0:
        share = train // num_replicas
        choices = divisors(share)
        if micro is not None:
            near = min(choices, key=lambda size: (abs(size - micro), size))
            plans.append(BatchPlan(train, near, share // near, num_replicas))
        if accumulation is not None:
            near = min(choices, key=lambda steps: (abs(steps - accumulation), steps))
            plans.append(BatchPlan(train, share // near, near, num_replicas))
    for lower in (True, False):
        if micro is not None:
            steps = train // (micro * num_replicas) + (not lower)
            plans.append(BatchPlan(micro * steps * num_replicas, micro, steps, num_replicas))
        else:
            steps = accumulation or 1
            size = train // (steps * num_replicas) + (not lower)
            plans.append(BatchPlan(size * steps * num_replicas, size, steps, num_replicas))
    if micro is not None and accumulation is not None:
        plans.append(BatchPlan(micro * accumulation * num_replicas, micro, accumulation, num_replicas))
    unique = dict.fromkeys(plan for plan in plans if plan.train_batch_size > 0)
    return sorted(unique, key=lambda plan: (abs(plan.train_batch_size - train), plan.train_batch_size))


def divisors(number: int) -> list[int]:
    """Return the divisors of a positive number in order: all up to 10^12, beyond it those below 10^6 and their partners."""
    small = [size for size in range(1, min(isqrt(number), 10**6) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})
