"""`xformer-train doctor`: whether a run can start on this machine or on the hosts of a hostfile, and what to do where not.

`doctor_facts.py` asks a machine, `doctor_machine.py` and `doctor_hosts.py` judge the answers.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from ...kernels.errors import UserError
from ..config.loading import ConfigError, load_config
from ..config.paths import missing_paths
from ..config.schema import RunConfig
from ..processes.words import size
from . import doctor_facts
from .doctor_hosts import examine_hosts
from .doctor_machine import Finding, devices, folders, kernels, port, questions, software, system
from .hostfile import Slots
from .launch import (
    DEFAULT_PORT,
    LaunchOptions,
    choose_hosts,
    count_processes,
    free_port,
    local_devices,
    plan_launch,
    start,
)

_BANDWIDTH_LIMIT_S = 120.0


def examine(
    options: LaunchOptions, config_file: Path | None, taken: Callable[[RunConfig], str], *, quick: bool
) -> Iterator[Finding]:
    """Yield all findings, each as soon as it is there.

    taken: says why the run directory of a run config cannot take a new run. quick: leave out the all-reduce.
    """
    slots, processes, faults = _choose(options)
    yield from faults
    config, findings = _examine_config(config_file, taken, processes)
    yield from findings
    machine = doctor_facts.facts(questions(config, port=options.master_port or DEFAULT_PORT))
    yield from _checked("software", lambda: software(machine))
    yield from _checked("devices", lambda: devices(machine))
    yield from _checked("kernels", lambda: kernels(config, machine))
    yield from _checked("system", lambda: system(machine))
    yield from _checked("folders", lambda: folders(machine))
    reachable = not faults
    if options.hostfile is None:
        yield from port(machine, options)
    elif slots is not None:
        on_hosts = list(_checked("hosts", lambda: examine_hosts(options, slots, config_file, config, machine)))
        yield from on_hosts
        reachable = all(finding.level != "FAIL" for finding in on_hosts)
    if not quick and reachable:
        yield from _checked("all-reduce", lambda: bandwidth(options, slots, config))
    elif not quick:
        yield Finding("warn", "all-reduce", "not tried, because of the failures above")


def _checked(what: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Yield the findings of a check; what goes wrong in it is a finding too."""
    try:
        yield from check()
    except Exception as error:
        remedy = "see what the error says; this check did not end"
        yield Finding("FAIL", what, f"{type(error).__name__}: {error}", remedy)


def _choose(options: LaunchOptions) -> tuple[Slots | None, int | None, list[Finding]]:
    """Return the hosts of the run, its number of processes, and what is wrong with the choice: then both are None."""
    try:
        slots = choose_hosts(options)
        return slots, count_processes(options, slots), []
    except UserError as error:
        what = "processes" if options.hostfile is None else "hostfile"
        remedy = "mend the choice" if options.hostfile is None else "mend the hostfile, or the choice from it"
        return None, None, [Finding("FAIL", what, problem, remedy) for problem in str(error).splitlines()]


def _examine_config(
    path: Path | None, taken: Callable[[RunConfig], str], processes: int | None
) -> tuple[RunConfig, list[Finding]]:
    """Return the run config, the default one if there is none or it is wrong. processes: None where that is not known."""
    if path is None:
        return RunConfig(), []
    try:
        loaded = load_config(path, world_size=processes)
    except ConfigError as error:
        return RunConfig(), [Finding("FAIL", "run config", problem, "mend the file") for problem in error.problems]
    on = "" if processes is None else " for 1 process" if processes == 1 else f" for {processes} processes"
    findings = [Finding("ok", "run config", f"{path} is valid{on}")]
    findings += [Finding("FAIL", "run config", problem, "mend the file") for problem in missing_paths(loaded)]
    what, _, remedy = taken(loaded.config).partition("; ")
    if what:
        findings.append(Finding("warn", "run directory", what, remedy))
    return loaded.config, findings


def bandwidth(options: LaunchOptions, slots: Slots | None, config: RunConfig) -> Iterator[Finding]:
    """Yield whether, and how fast, the processes of the run exchange gradients. slots: None for this machine alone."""
    where = None
    if slots is not None:
        where = Path(config.output_dir).absolute()
        where.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=where) as temporary:
        result = Path(temporary) / "all_reduce.json"
        module = "xformer_train.launcher.machines.doctor_bandwidth"
        if slots is None:
            fault = _local_bandwidth(module, result, options.num_gpus or len(local_devices()) or 2)
        else:
            outcome = start(plan_launch(options, slots, [str(result)], module), Path(temporary))
            fault = outcome.text.splitlines()[-1] if outcome.exit_code else ""
        if fault or not result.exists():
            remedy = "name the network's interface in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, and open its ports"
            yield Finding("FAIL", "all-reduce", fault or "no process answered", remedy)
            return
        measured = json.loads(result.read_text())
    processes, num_bytes = measured["processes"], measured["bytes"]
    if processes == 1:
        yield Finding("ok", "all-reduce", "one process exchanges nothing")
        return
    rate = 2 * (processes - 1) / processes * num_bytes / measured["seconds"] / 1e9
    took = f"{size(num_bytes)} in {1e3 * measured['seconds']:.1f} ms, {rate:.2f} GB/s to and from each"
    yield Finding("ok", "all-reduce", f"{measured['backend']}, {processes} processes: {took}")


def _local_bandwidth(module: str, result: Path, processes: int) -> str:
    """Return what went wrong, empty if nothing did. DeepSpeed's launcher is not used: it starts slower than the check runs."""
    place = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(result)],
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        errors = [process.communicate(timeout=_BANDWIDTH_LIMIT_S)[1] for process in started]
    except subprocess.TimeoutExpired:
        return f"no end after {_BANDWIDTH_LIMIT_S:.0f} s"
    finally:
        for process in started:
            process.kill()
    failed = [error.strip() for process, error in zip(started, errors, strict=True) if process.returncode]
    return failed[0].splitlines()[-1] if failed and failed[0] else "a process failed without a word" if failed else ""
