"""The learning rate of every step, as a pure function: nothing to save, nothing to restore."""

import math

from ..config.schema import ScheduleConfig


def warmup_length(schedule: ScheduleConfig, total_steps: float) -> float:
    """Return the length of the warm-up in steps, a fraction where warmup_proportion gives one; 0 if neither key is given."""
    if schedule.warmup_steps is not None:
        return float(schedule.warmup_steps)
    return (schedule.warmup_proportion or 0.0) * total_steps


def learning_rate(schedule: ScheduleConfig, base_lr: float, total_steps: float, step: float) -> float:
    """Return the learning rate of one optimizer step, never negative: base_lr · f(step) + lr_offset within the warm-up, and
    min_lr + (base_lr - min_lr) · f(step) + lr_offset behind it.

    step counts from 0 at the start of the schedule, which need not be the start of the run (load.rewarmup); total_steps
    is the length of the schedule. Where the schedule follows the time of a run, both are times in any unit, and it has no rule
    in steps. With t = step, T = total_steps, W = warmup_length:
      f on t < W    (t/W)² for EE, (t/W)^1.5 for EP, t/W for all others; so step 0 runs at lr_offset
      f from W on   EE, LE: decay_rate^((t - W)/decay_steps)    EP: (1 - t/T)²    linear: (T - t)/(T - W)
                    cosine: (1 + cos(π(t - W)/(T - W)))/2       constant: 1
      wsd           min(t/W, 1, (T - t)/D) with D = decay_proportion · T; with decay 1-sqrt, 1 - √(1 - (T - t)/D) for (T - t)/D
    From T on, EP, linear, cosine and wsd stay at f = 0 (hence min_lr), the others follow their formula. EP jumps from 1
    down to (1 - W/T)² where the warm-up ends, as in DeepSpeed's BERT recipe, whose EE, LE and EP these are. They differ
    from it in one case: without warm-up it holds lr constant for ever, here the decay starts at step 0.
    """
    assert step >= 0, f"step={step} counts from 0"
    rises = step < min(total_steps, warmup_length(schedule, total_steps))
    end = 0.0 if rises else schedule.min_lr
    return end + (base_lr - end) * _factor(schedule, total_steps, step) + schedule.lr_offset


def _factor(schedule: ScheduleConfig, total_steps: float, step: float) -> float:
    """Return f(step) of `learning_rate`, between 0 and 1."""
    warmup_steps = warmup_length(schedule, total_steps)
    if schedule.type not in ("EE", "LE", "constant") and step >= total_steps:
        return 0.0
    if schedule.type == "wsd":
        decay_steps = schedule.decay_proportion * total_steps
        rise = step / warmup_steps if step < warmup_steps else 1.0
        fall = (total_steps - step) / decay_steps if total_steps - step < decay_steps else 1.0
        return min(rise, fall if schedule.decay == "linear" else 1 - math.sqrt(1 - fall))
    if step < warmup_steps:
        power = {"EE": 2.0, "EP": 1.5}.get(schedule.type, 1.0)
        return (step / warmup_steps) ** power
    if schedule.type in ("EE", "LE"):
        return schedule.decay_rate ** ((step - warmup_steps) / schedule.decay_steps)
    if schedule.type == "constant":
        return 1.0
    if schedule.type == "EP":
        return (1 - step / total_steps) ** 2
    progress = (step - warmup_steps) / (total_steps - warmup_steps)  # warmup_steps <= step < total_steps
    return 1 - progress if schedule.type == "linear" else (1 + math.cos(math.pi * progress)) / 2
