"""Batch arithmetic: train_batch_size = micro_batch_size * gradient_accumulation_steps * processes. Torch-free."""

from dataclasses import dataclass
from math import isqrt

from .config import TrainingConfig


@dataclass(frozen=True)
class BatchPlan:
    """How the sequences of one optimizer step are divided; always consistent when it comes from `solve_batch`."""

    train_batch_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    world_size: int


def solve_batch(training: TrainingConfig, world_size: int) -> BatchPlan:
    """The batch of a run over `world_size` data-parallel processes.

    Any two of the three keys give the third. One alone leaves gradient_accumulation_steps at 1. Raises ValueError, with
    the nearest consistent values, when the keys contradict each other, and when neither batch size is given.
    """
    train, micro = training.train_batch_size, training.micro_batch_size
    accumulation = training.gradient_accumulation_steps
    if train is None and micro is None:
        raise ValueError(
            "training.train_batch_size: no batch size is given; give training.train_batch_size (sequences per step, over "
            "all processes) or training.micro_batch_size (sequences per forward pass of one process), or both"
        )
    if train is None:
        assert micro is not None, "checked above"
        accumulation = accumulation or 1
        return BatchPlan(micro * accumulation * world_size, micro, accumulation, world_size)
    if micro is None:
        micro = train // ((accumulation or 1) * world_size)
        accumulation = accumulation or 1
    elif accumulation is None:
        accumulation = train // (micro * world_size)
    if micro * accumulation * world_size != train:
        raise ValueError(_contradiction(training, world_size))
    return BatchPlan(train, micro, accumulation, world_size)


def _contradiction(training: TrainingConfig, world_size: int) -> str:
    train, micro = training.train_batch_size, training.micro_batch_size
    accumulation = training.gradient_accumulation_steps
    assert train is not None, "a contradiction needs a train_batch_size"
    given = {"micro_batch_size": micro, "gradient_accumulation_steps": accumulation}
    factors = [f"{key} {value}" for key, value in given.items() if value is not None]
    processes = f"{world_size} {'process' if world_size == 1 else 'processes'}"
    needs = (
        f"must be {micro * accumulation * world_size}, which is"
        if micro and accumulation
        else "must be a multiple of"
        if factors or world_size > 1
        else "must be"
    )
    choices = "; ".join(
        f"{plan.train_batch_size} = {plan.micro_batch_size} x {plan.gradient_accumulation_steps} x {world_size}"
        for plan in nearest_plans(training, world_size)
    )
    return (
        f"training.train_batch_size: got {train}, {needs} {' times '.join([*factors, processes])}; nearest that fit "
        f"(train_batch_size = micro_batch_size x gradient_accumulation_steps x processes): {choices}"
    )


def nearest_plans(training: TrainingConfig, world_size: int) -> list[BatchPlan]:
    """Consistent plans near a contradictory one, each of which changes as few of the given keys as it can.

    First those that keep train_batch_size, where the number of processes divides it, then its nearest multiples.
    """
    train, micro = training.train_batch_size, training.micro_batch_size
    accumulation = training.gradient_accumulation_steps
    assert train is not None, "a contradiction needs a train_batch_size"
    plans: list[BatchPlan] = []
    if train % world_size == 0:
        share = train // world_size
        divisors = _divisors(share)
        if micro is not None:
            near = min(divisors, key=lambda size: (abs(size - micro), size))
            plans.append(BatchPlan(train, near, share // near, world_size))
        if accumulation is not None:
            near = min(divisors, key=lambda steps: (abs(steps - accumulation), steps))
            plans.append(BatchPlan(train, share // near, near, world_size))
    for lower in (True, False):
        if micro is not None:
            steps = train // (micro * world_size) + (not lower)
            plans.append(BatchPlan(micro * steps * world_size, micro, steps, world_size))
        else:
            steps = accumulation or 1
            size = train // (steps * world_size) + (not lower)
            plans.append(BatchPlan(size * steps * world_size, size, steps, world_size))
    if micro is not None and accumulation is not None:
        plans.append(BatchPlan(micro * accumulation * world_size, micro, accumulation, world_size))
    unique = dict.fromkeys(plan for plan in plans if plan.train_batch_size > 0)
    return sorted(unique, key=lambda plan: (abs(plan.train_batch_size - train), plan.train_batch_size))


def _divisors(number: int) -> list[int]:
    small = [size for size in range(1, isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})
