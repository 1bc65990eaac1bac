"""What `xformer-train doctor` wants to know of one machine, printed as a JSON object.

Started as a script, here or through ssh, with a JSON object on stdin (see `Questions`); imports the standard library only, so
that it answers within a second and where nothing is installed.
"""

import contextlib
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any, TypedDict

_NVIDIA_SMI_LIMIT_S = 20.0


class Questions(TypedDict):
    """What is asked of a machine."""

    packages: list[str]
    folders: list[str]
    """Folders that a run writes to, there or to be made."""
    files: list[str]
    """Files that a run reads."""
    names: list[str]
    """Hosts that it must find."""
    port: int | None
    """A port that must be free, on the host where processes meet."""
    python_path: str
    """PYTHONPATH of the machine that asks."""


def facts(questions: Questions) -> dict[str, Any]:
    """Return the answers; sizes in bytes, times in seconds."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    return {
        "time_s": time.time(),
        "name": platform.node(),
        "own_addresses": _addresses(socket.gethostname()),
        "python": platform.python_version(),
        "c_library": " ".join(platform.libc_ver()).strip() or "unknown",
        "packages": {package: version(package) for package in questions["packages"]},
        "gpus": _gpus(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_available": _memory_available(),
        "open_files": limit[0] if limit[0] != resource.RLIM_INFINITY else 2**31,
        "shared_memory": shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else None,
        "folders": {folder: _folder(Path(folder)) for folder in questions["folders"]},
        "files": {file: Path(file).is_file() for file in questions["files"]},
        "names": {name: _addresses(name) for name in questions["names"]},
        "port_free": questions["port"] is None or is_free(questions["port"]),
        "tools": {tool: shutil.which(tool) is not None for tool in ("cc", "gcc", "clang")},
    }


def version(package: str) -> str | None:
    """Return the version of an installed package."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def _addresses(name: str) -> list[str]:
    with contextlib.suppress(OSError):
        return sorted({str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)})
    return []


def _gpus() -> list[dict[str, Any]]:
    """Return the NVIDIA GPUs as their driver lists them; none where there is no driver."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_NVIDIA_SMI_LIMIT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    return [
        {"name": name, "driver": driver, "total": _mebibytes(total), "used": _mebibytes(used)}
        for name, driver, total, used in rows
    ]


def _mebibytes(text: str) -> int:
    return int(text) * 2**20 if text.isdecimal() else 0  # some devices say [N/A]


def _memory_available() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


def _folder(folder: Path) -> dict[str, Any]:
    """Return free bytes, and why it cannot be written (None if it can), of a folder, or the nearest one above that is there."""
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        return {"free": 0, "fault": f"{existing} is a file"}
    probe = existing / f".doctor-{platform.node()}-{os.getpid()}"
    try:
        probe.touch()  # permission bits do not tell: root, read-only mounts, quotas
        probe.unlink()
        return {"free": shutil.disk_usage(existing).free, "fault": None}
    except OSError as error:
        return {"free": 0, "fault": f"{existing}: {error.strerror}"}


def is_free(port: int) -> bool:
    """Return whether nobody listens on a port of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


if __name__ == "__main__":
    asked: Questions = json.load(sys.stdin)
    sys.path[1:1] = [folder for folder in asked["python_path"].split(os.pathsep) if folder]
    json.dump(facts(asked), sys.stdout)
