"""A run from its config to its exit status. Read it top to bottom."""

import logging
import time
from contextlib import ExitStack

import torch

from ...kernels.errors import RefusedError
from ..config.loading import LoadedConfig
from ..config.phases import Phases
from ..config.schema import RunConfig, length_key
from ..processes.signals import StopAsked, StopRequest
from ..processes.topology import Topology, start_processes, stop_processes
from ..processes.watchdog import Watchdog, collective_timeout_s
from .length import is_over
from .loop import train
from .prepare import prepare
from .report import closing_summary

_LOG = logging.getLogger(__name__)
_CPU_ALLOCATOR = "DefaultCPUAllocator: "


def run(loaded: LoadedConfig, *, resume: bool) -> int:
    """Train what the config says, on every process of the run alike, after `topology.quiet`.

    Returns the exit status: 0 if the run is finished or a person stopped it, `rank_status.REQUEUE` if a scheduler did.
    resume: continue the run directory where it has checkpoints.
    Raises UserError for what a person can mend; its RefusedError for what the system refuses and for a lost process.
    """
    started_s = time.monotonic()
    hang_timeout_s = loaded.config.reliability.hang_timeout_s
    topology = start_processes(collective_timeout_s(hang_timeout_s), loaded.config.parallel.tensor)
    try:
        with StopRequest(topology) as stop, Watchdog(topology, hang_timeout_s, stop) as watchdog, ExitStack() as held:
            try:
                setup, progress = prepare(loaded, topology, stop, watchdog, held, resume=resume)
                if is_over(loaded.config, progress, setup.total_steps):
                    key = length_key(loaded.config.training)
                    what = f"step {progress.step:,} is reached"
                    if setup.total_steps is None:
                        what = f"the time of the run is over at step {progress.step:,}"
                    topology.say(f"nothing to do: {what}; raise training.{key} to go on")
                    return 0
                told_to_stop = stop.agreed_now()
            except StopAsked:
                told_to_stop = stop.agreed_now()
            if told_to_stop:
                topology.say("stopped before the first step; nothing was trained")
                return stop.exit_status
            tally = train(setup, progress)
            topology.say(closing_summary(setup, tally, time.monotonic() - started_s))
            return 0 if tally.finished else stop.exit_status
    except Exception as error:
        _LOG.exception("the run failed")
        reason = _out_of_memory(error)
        if reason:
            raise RefusedError(f"out of memory: {reason}; {_less_memory(loaded.config, topology)}") from error
        raise
    finally:
        stop_processes()


def _out_of_memory(error: Exception) -> str:
    """Return what was asked for in vain, empty if the error is another one. torch has no type for the memory of a CPU."""
    text = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return text
    return text.partition(_CPU_ALLOCATOR)[2] if isinstance(error, RuntimeError) else ""


def _less_memory(config: RunConfig, topology: Topology) -> str:
    """Return what the run holds, and the keys by which it would hold less."""
    phases = Phases(config, topology.num_replicas).all
    most = max(phases, key=lambda phase: phase.batch.micro_batch_size * phase.config.data.max_seq_length)
    micro, length, training = most.batch.micro_batch_size, most.config.data.max_seq_length, config.training
    return (
        f"lower training.micro_batch_size {micro} or data.max_seq_length {length}{most.since}, set "
        f"training.activation_checkpointing, which is {training.activation_checkpointing}, or the flags gelu_checkpoint, "
        "attn_dropout_checkpoint and normalize_invertible of layer: docs/memory.md has the bytes"
    )
