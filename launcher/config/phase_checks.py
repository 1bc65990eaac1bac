"""Rules of `phases` and of the batch's warm-up, and all rules of a run config for the config of every phase. Torch-free.

Faults are as in `checks.py`. What a phase breaks is told of the key of the phase that breaks it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from ...kernels.errors import UserError
from ...recipes.config import Fault
from .batch import solve_batch
from .checks import faults, num_replicas
from .phases import first_steps, phase_configs
from .schema import RUN_LENGTHS, RunConfig

_FROM, _STEPS = "training.batch_warmup_from", "training.batch_warmup_steps"


def faults_of_all_phases(config: RunConfig, world_size: int | None) -> Iterator[Fault]:
    """Yield every broken rule of a run config, at its start and in each phase. world_size: as in `checks.faults`."""
    misplaced = [*_place_faults(config)] or [*_order_faults(config)]
    yield from misplaced
    yield from _warmup_faults(config, world_size)
    told: set[Fault] = set()
    for number, stretch in enumerate(phase_configs(config)):
        steps = None if misplaced else _steps_of_schedule(config, number)
        whole = stretch if steps is None else _of_length(stretch, steps)
        found = [_without_length(fault, steps) for fault in faults(whole, world_size)]
        yield from (_blamed(fault, config, number) for fault in found if fault not in told)
        told.update(found)


def _place_faults(config: RunConfig) -> Iterator[Fault]:
    """Yield phases of which it is not known where they begin or what they change."""
    if config.phases is not None and not config.phases:
        yield Fault(("phases",), "is an empty list; give a phase, or null for none")
    training, configs = config.training, phase_configs(config)
    for index, phase in enumerate(config.phases or []):
        step, share = f"phases.{index}.from_step", f"phases.{index}.from_share"
        if phase.from_step is None and phase.from_share is None:
            yield Fault((step, share), "is missing; say here at which step the phase begins, or as from_share")
        elif phase.from_step is not None and phase.from_share is not None:
            text = f"got {phase.from_share}, but from_step {phase.from_step} is given too; keep one of the two"
            yield Fault((share, step), text)
        elif phase.from_share is not None and training.max_steps is None:
            why = "it is a share of training.max_steps, which is not given"
            yield Fault((share, "training.max_steps"), f"got {phase.from_share}, but {why}; give from_step")
        for name, value in phase.objective.model_dump().items() if config.objective.type == "clm" else ():
            text = f"got {value}, but objective.type clm predicts every token; remove it"
            yield Fault((f"phases.{index}.objective.{name}", "objective.type"), text)
        weights, sources = phase.data.source_weights, config.data.sources
        if weights is not None and len(weights) != len(sources):
            text = f"got {len(weights)} of them, must be {len(sources)}: one for each of data.sources, in their order"
            yield Fault((f"phases.{index}.data.source_weights", "data.sources"), text)
        elif not phase.begins_schedule and configs[index + 1] == configs[index]:
            text = "changes nothing; give a value other than the one before it, or remove the phase"
            yield Fault((f"phases.{index}",), text)
        if phase.begins_schedule and (training.max_hours is not None or config.load.decay):
            given = f"phases.{index}.{'optimizer.lr' if phase.schedule is None else 'schedule'}"
            whole, remedy = "load.decay", "remove it, or load.decay"
            if training.max_hours is not None:
                whole, remedy = "training.max_hours", "remove it, or give training.max_steps"
            text = f"begins a schedule of its own, but with {whole} one schedule goes through the whole run; {remedy}"
            yield Fault((given, whole), text)


def _order_faults(config: RunConfig) -> Iterator[Fault]:
    """Yield phases that begin too early or too late."""
    firsts, end = first_steps(config), config.training.max_steps
    for number in range(1, len(firsts)):
        key, value = _place(config, number)
        before = firsts[number - 1]
        if firsts[number] <= before:
            other = f"{_place(config, number - 1)[0].rpartition('.')[0]}, which begins at step {before}"
            rule = f"must be later than {other if number > 1 else 'the start of the run'}"
            yield Fault((key,), f"got {value}, {rule}; give the phases in the order of their steps")
        elif end is not None and firsts[number] >= end:
            text = (
                f"got {value}, must be before the run ends at training.max_steps {end}; raise that, or remove the phase"
            )
            yield Fault((key, "training.max_steps"), text)


def _place(config: RunConfig, number: int) -> tuple[str, str]:
    """Return the key that says where a phase begins, and its value in words."""
    phase = (config.phases or [])[number - 1]
    if phase.from_step is not None:
        return f"phases.{number - 1}.from_step", str(phase.from_step)
    return f"phases.{number - 1}.from_share", f"{phase.from_share}, which is step {first_steps(config)[number]}"


def _warmup_faults(config: RunConfig, world_size: int | None) -> Iterator[Fault]:
    """Yield what is wrong with the warm-up of the batch."""
    training = config.training
    first, steps = training.batch_warmup_from, training.batch_warmup_steps
    if first is None or steps is None:
        if first is not None or steps is not None:
            missing, given = (_FROM, _STEPS) if first is None else (_STEPS, _FROM)
            yield Fault((missing, given), f"is missing, though {given} is given; give both or none")
        return
    if training.num_epochs is not None:
        why = f"with training.num_epochs {training.num_epochs} the length of the run is no number of steps"
        yield Fault((_STEPS, "training.num_epochs"), f"got {steps}, but {why}; give training.max_steps in its place")
    for number, phase in enumerate(config.phases or [], start=1):
        if phase.training.model_dump() and 0 < first_steps(config)[number] < steps:
            key, value = _place(config, number)
            why = f"for the phase sets another batch, and until then {_STEPS} lets the batch grow"
            yield Fault((key, _STEPS), f"got {value}, must be at least {steps}, {why}")
    try:
        batch = solve_batch(training, num_replicas(config, world_size))
    except UserError:  # a fault of its own
        return
    unit = batch.micro_batch_size * batch.num_replicas
    if first >= batch.train_batch_size:
        rule = f"must be less than training.train_batch_size {batch.train_batch_size}, to which the batch grows"
        yield Fault((_FROM, "training.train_batch_size"), f"got {first}, {rule}")
    elif first % unit:
        rule = (
            f"training.micro_batch_size {batch.micro_batch_size} times {batch.num_replicas}, the replicas of the model"
        )
        low, high = first // unit * unit, first // unit * unit + unit
        near = " or ".join(str(size) for size in (low, high) if 0 < size < batch.train_batch_size)
        text = f"got {first}, must be a multiple of {rule}; give {near or 'a smaller training.micro_batch_size'}"
        yield Fault((_FROM, "training.micro_batch_size"), text)


def _steps_of_schedule(config: RunConfig, number: int) -> int | None:
    """Return the length of the schedule that a phase has; None where it is not known, or the run has one schedule only."""
    firsts = first_steps(config)
    begins = [0, *(n for n, phase in enumerate(config.phases or [], start=1) if phase.begins_schedule)]
    if len(begins) == 1:
        return None
    start = max(n for n in begins if n <= number)
    end = next((firsts[n] for n in begins if n > number), config.training.max_steps)
    return None if end is None else end - firsts[start]


def _of_length(config: RunConfig, steps: int) -> RunConfig:
    """Return the run config with another length."""
    lengths: dict[str, Any] = {**dict.fromkeys(RUN_LENGTHS), "max_steps": steps}
    return config.model_copy(update={"training": config.training.model_copy(update=lengths)})


def _without_length(fault: Fault, steps: int | None) -> Fault:
    """Return the fault without a training.max_steps that the user has not given."""
    return Fault(fault.keys, fault.text.replace(f"training.max_steps {steps}", f"the {steps} steps of this schedule"))


def _blamed(fault: Fault, config: RunConfig, number: int) -> Fault:
    """Return a fault that comes with a phase as one of the key of the phase that it comes with."""
    if number == 0:
        return fault
    index, given = number - 1, _given_keys(config, number)
    named = fault.keys[0]
    if _meets(named, given) and named != "data.sources":
        return Fault((f"phases.{index}.{named}", *fault.keys[1:]), fault.text)
    key = next((key for key in given if any(_meets(read, [key]) for read in fault.keys)), None)
    place = f"phases.{index}" if key is None else f"phases.{index}.{key}"
    return Fault((place, *fault.keys), f"makes {named} wrong: {fault.text}")


def _given_keys(config: RunConfig, number: int) -> list[str]:
    """Return the keys that a phase gives, dotted, as they are spelled in it; a schedule as a whole."""
    changes = (config.phases or [])[number - 1].model_dump(exclude={"from_step", "from_share"})
    return [
        section if section == "schedule" else f"{section}.{key}" for section, keys in changes.items() for key in keys
    ]


def _meets(key: str, given: Sequence[str]) -> bool:
    """Return whether a key is one of those given, in one of them, or around one."""
    return any(f"{key}.".startswith(f"{one}.") or f"{one}.".startswith(f"{key}.") for one in given)
