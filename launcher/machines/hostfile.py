"""Hostfiles, in the form of DeepSpeed and MPI (`host slots=N` on each line), and the choice of hosts and slots from one."""

import re
from collections.abc import Mapping
from pathlib import Path

from ...kernels.errors import UserError, refused

Slots = dict[str, tuple[int, ...]]
"""The slots that a run uses on each host, in the order of the hostfile, which is the order of ranks."""

_LINE = re.compile(r"(\S+)\s+slots=(\d+)(\s+max[-_]slots=\d+)?\s*(#.*)?")
_MOST_SLOTS = 1024
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # what ssh and a remote shell take as it stands


def read_hostfile(path: Path) -> Slots:
    """Return all slots of each host. Blank lines and lines that begin with # are skipped.

    Raises UserError with every problem in the file.
    """
    if not path.is_file():
        remedy = "give one that lists a host on each line, such as `node1 slots=8`"
        raise UserError(f"--hostfile={path} is not a file; {remedy}")
    hosts: Slots = {}
    problems = []
    try:
        with refused(f"--hostfile={path} cannot be read", "correct its permissions"):
            lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"--hostfile={path} is not UTF-8 text; give a text file, a host on each line") from None
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            problems.append(f"{path}:{number}: got {text!r}, must be one host and its slots, such as `node1 slots=8`")
        elif not _HOST.fullmatch(match[1]):
            rule = "must be a name or address of letters, digits, `.` and `-`; user and port go into ~/.ssh/config"
            problems.append(f"{path}:{number}: host {match[1]!r} {rule}")
        elif match[1] in hosts:
            problems.append(f"{path}:{number}: host {match[1]} stands there twice; give its slots on one line")
        elif len(match[2]) > 9 or int(match[2]) > _MOST_SLOTS:
            rule = f"must be at most {_MOST_SLOTS}: one for each of its GPUs"
            problems.append(f"{path}:{number}: host {match[1]} has slots={match[2][:20]}, {rule}")
        elif int(match[2]) < 1:
            problems.append(f"{path}:{number}: host {match[1]} has no slots; give it 1 or more, or remove the line")
        else:
            hosts[match[1]] = tuple(range(int(match[2])))
    if not hosts and not problems:
        problems.append(f"{path}: holds no host; write one on each line, such as `node1 slots=8`")
    loopback = [host for host in hosts if host == "localhost" or host.startswith("127.")]
    if loopback and len(hosts) > 1:
        remedy = "give the name by which all reach it"
        problems.append(f"{path}: {loopback[0]} means another machine on each host; {remedy}")
    if problems:
        raise UserError("\n".join(problems))
    return hosts


def choose_slots(
    hosts: Mapping[str, tuple[int, ...]],
    *,
    include: str = "",
    exclude: str = "",
    num_nodes: int | None = None,
    num_gpus: int | None = None,
) -> Slots:
    """Return the slots that a run uses.

    include, exclude: DeepSpeed's `host[:slot,slot]@host...`. num_nodes: the first hosts. num_gpus: the first slots of each.
    Raises UserError if they contradict each other or ask for what the hostfile does not have.
    """
    if include and exclude:
        raise UserError("--include and --exclude exclude each other; give one of them")
    if (include or exclude) and (num_nodes or num_gpus):
        rule = "so --num-nodes and --num-gpus do not go with them"
        raise UserError(f"--include and --exclude name hosts and slots, {rule}")
    if include:
        named = _parse_filter("--include", include, hosts)
        return {host: named[host] or hosts[host] for host in hosts if host in named}
    if exclude:
        named = _parse_filter("--exclude", exclude, hosts)
        without = {host: named[host] or slots for host, slots in hosts.items() if host in named}  # none of them: all
        kept = {host: tuple(slot for slot in hosts[host] if slot not in without.get(host, ())) for host in hosts}
        chosen = {host: slots for host, slots in kept.items() if slots}
        if not chosen:
            raise UserError(f"--exclude {exclude} leaves no slot of the hostfile")
        return chosen
    if num_nodes and num_nodes > len(hosts):
        rule = f"must be at most {len(hosts)}, the number of hosts in the hostfile"
        raise UserError(f"--num-nodes is {num_nodes}, {rule}")
    chosen = dict(list(hosts.items())[: num_nodes or None])
    for host, slots in chosen.items():
        if num_gpus and num_gpus > len(slots):
            raise UserError(f"--num-gpus is {num_gpus}, and host {host} has slots={len(slots)} in the hostfile")
    return {host: slots[: num_gpus or None] for host, slots in chosen.items()}


def _parse_filter(option: str, text: str, hosts: Mapping[str, tuple[int, ...]]) -> Slots:
    """Return the slots that a filter names for each host; none for a host that it names as a whole."""
    named: Slots = {}
    for part in text.split("@"):
        host, colon, numbers = part.partition(":")
        if host not in hosts:
            raise UserError(f"{option}: host {host!r} is not in the hostfile, which has {', '.join(hosts)}")
        slots = numbers.split(",") if colon else []
        if not all(slot.isdecimal() for slot in slots):
            raise UserError(f"{option}: got {part!r}, must be a host and perhaps slots, such as node1:0,2")
        missing = [slot for slot in slots if int(slot) not in hosts[host]]
        if missing:
            there = f"slots 0 to {len(hosts[host]) - 1} in the hostfile"
            raise UserError(f"{option}: host {host} has {there}, and not slot {missing[0]}")
        if host in named:
            raise UserError(f"{option}: host {host} is named twice; give its slots together, such as {host}:0,2")
        named[host] = tuple(sorted({int(slot) for slot in slots}))
    return named
