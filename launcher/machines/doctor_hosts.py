"""The part of `doctor` that asks the hosts of a hostfile, all at once, through ssh."""

import ipaddress
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.schema import RunConfig
from . import doctor_facts
from .doctor_facts import Questions
from .doctor_machine import Finding, folders, questions, system
from .hostfile import Slots
from .launch import DEFAULT_PORT, LaunchOptions, is_this_machine
from .supervision import SSH

_LIMIT_S = 60.0  # ssh itself gives up sooner
_MOST_SKEW_S = 1.0
_MOST_HOSTS_AT_ONCE = 64
_SAME_EVERYWHERE = ("xformer-train", "torch", "deepspeed", "triton", "python")
_TOOLS = {"ssh": "ssh", "pdsh": "pdsh", "openmpi": "mpirun", "mpich": "mpirun", "impi": "mpirun", "slurm": "srun"}


@dataclass(frozen=True)
class Answer:
    """What a host said."""

    facts: dict[str, Any] | None
    fault: str = ""
    """Why it said nothing."""
    skew_s: float = 0.0
    """Its clock ahead of ours, beyond what the way there explains."""


def examine_hosts(
    options: LaunchOptions, slots: Slots, config_file: Path | None, config: RunConfig, here: Mapping[str, Any]
) -> Iterator[Finding]:
    """Ask and judge `slots`, the hosts of the run. config: of config_file, or the default. here: the facts of this machine."""
    hosts = f"{len(slots)} {'host' if len(slots) == 1 else 'hosts'}"
    yield Finding("ok", "hostfile", f"{options.hostfile}: {hosts}, slots: {sum(map(len, slots.values()))}")
    tool = _TOOLS[options.launcher]
    if found := shutil.which(tool):
        yield Finding("ok", "launcher", f"{options.launcher}: {found}")
    else:
        yield Finding("FAIL", "launcher", f"{tool} is not installed here", f"install {tool}, or use another --launcher")
    master, port = options.master_addr or next(iter(slots)), options.master_port or DEFAULT_PORT
    output = Path(config.output_dir).absolute()
    shared = output if output.exists() else next(folder for folder in output.parents if folder.exists())
    with tempfile.NamedTemporaryFile(prefix=".doctor-", dir=shared if os.access(shared, os.W_OK) else None) as marker:
        files = [marker.name, *([str(config_file.absolute())] if config_file else [])]
        asked = questions(config, port=None, files=files, names=[master])
        answers = ask_hosts(slots, asked, port=port)
    for rank, (host, answer) in enumerate(answers.items()):
        if answer.facts is None:
            remedy = f"make `ssh {host} true` work without a password, and the same Python be at the same place there"
            yield Finding("FAIL", host, answer.fault, remedy)
        else:
            yield from judge_host(host, answer, here, slots[host])
            yield from judge_network(host, answer.facts, (master, port), is_master=rank == 0, several=len(slots) > 1)


def ask_hosts(slots: Slots, asked: Questions, port: int) -> dict[str, Answer]:
    """Return the answers by host. port: asked of the first, where processes meet."""
    with ThreadPoolExecutor(min(len(slots), _MOST_HOSTS_AT_ONCE)) as pool:
        futures = {
            host: pool.submit(_ask, host, {**asked, "port": port if rank == 0 else None})
            for rank, host in enumerate(slots)
        }
        return {host: future.result() for host, future in futures.items()}


def _ask(host: str, asked: Questions) -> Answer:
    script = [sys.executable, doctor_facts.__file__]
    remote = [*SSH, host, f"cd {shlex.quote(str(Path.cwd()))} && {shlex.join(script)}"]
    command = script if is_this_machine(host) else remote
    asked_s = time.time()
    try:
        done = subprocess.run(
            command, input=json.dumps(asked), capture_output=True, text=True, timeout=_LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Answer(None, f"{error}")
    answered_s = time.time()
    if done.returncode:
        said = done.stderr.strip().splitlines()
        return Answer(None, f"no answer, exit code {done.returncode}: {said[-1] if said else 'without a word'}")
    facts = json.loads(done.stdout)
    # The clock was read between the two: only what lies outside is skew.
    skew_s = max(0.0, facts["time_s"] - answered_s) + min(0.0, facts["time_s"] - asked_s)
    return Answer(facts, skew_s=skew_s)


def judge_host(host: str, answer: Answer, here: Mapping[str, Any], slots: tuple[int, ...]) -> Iterator[Finding]:
    """Yield whether a host is like this machine and has what its slots need."""
    facts = answer.facts
    assert facts is not None, "judged after an answer only"
    theirs, ours = ({**each["packages"], "python": each["python"]} for each in (facts, here))
    different = [f"{x} {theirs[x]}, here {ours[x]}" for x in _SAME_EVERYWHERE if theirs[x] != ours[x]]
    if different:
        yield Finding("FAIL", host, "; ".join(different), "install the same versions on all hosts")
    else:
        yield Finding("ok", host, f"answers as {facts['name']}, with the same versions; clock {answer.skew_s:+.1f} s")
    gpus = facts["gpus"]
    name = f"{host} GPUs"
    if gpus and max(slots) >= len(gpus):
        yield Finding("FAIL", name, f"{len(gpus)}, and the hostfile uses slot {max(slots)}", "mend the hostfile")
    elif bool(gpus) != bool(here["gpus"]):
        has, has_not = (host, "this machine") if gpus else ("this machine", host)
        yield Finding("warn", name, f"{has} has GPUs and {has_not} has none", "launch from a machine like the others")
    elif gpus:
        yield Finding("ok", name, f"{len(gpus)} x {gpus[0]['name']}, driver {gpus[0]['driver']}")
    missing = [file for file, there in facts["files"].items() if not there]
    if missing:
        remedy = "put the run config and output_dir on storage that all hosts share"
        yield Finding("FAIL", f"{host} files", f"does not see {missing[0]}", remedy)
    more = (*system(facts, f"{host} "), *folders(facts, f"{host} "))
    yield from (finding for finding in more if finding.level != "ok")
    if abs(answer.skew_s) > _MOST_SKEW_S:
        remedy = "set its clock, by chrony or ntpd: times in logs, and which process failed first, are by it"
        yield Finding("warn", f"{host} clock", f"{answer.skew_s:+.1f} s against this machine", remedy)


def judge_network(
    host: str, facts: Mapping[str, Any], meeting: tuple[str, int], *, is_master: bool, several: bool
) -> Iterator[Finding]:
    """Yield whether a host finds the other hosts, and they it. meeting: host and port where processes meet, on the master."""
    master, port = meeting
    addresses = facts["names"][master]
    if not addresses:
        remedy = f"give its address with --master-addr, or let {host} know the name"
        yield Finding("FAIL", f"{host} network", f"does not find {master}, where processes meet", remedy)
    elif several and not is_master and all(map(_is_loopback, addresses)):
        remedy = "give --master-addr an address that all hosts reach"
        yield Finding("FAIL", f"{host} network", f"takes {master}, where processes meet, for itself", remedy)
    elif several and "GLOO_SOCKET_IFNAME" not in os.environ and all(map(_is_loopback, facts["own_addresses"])):
        remedy = "export GLOO_SOCKET_IFNAME with the name of its network interface, as in `ip addr`"
        detail = f"its own name, {facts['name']}, leads to no address that others reach"
        yield Finding("FAIL", f"{host} network", detail, remedy)
    if is_master and facts["port_free"]:
        yield Finding("ok", f"{host} port", f"{port}, where processes meet, is free")
    elif is_master:
        yield Finding("FAIL", f"{host} port", f"{port}, where processes meet, is taken", "choose another --master-port")


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
