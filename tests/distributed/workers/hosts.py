"""A launched run that loses a host, and then goes on: what `test_hosts.py` runs on the first of two hosts, as a script.

python hosts_worker.py CONFIG HOSTFILE METRICS      prints a JSON object
"""

import json
import subprocess
import sys
import time
from pathlib import Path

_START_LIMIT_S = 600.0
# The ranks wait for hang_timeout_s, DeepSpeed's launcher looks once a second, ssh takes 20 s to give a connection up, and what
# is then still there twice 15 s to be killed. Without all that the run would hang for half an hour or more.
_END_LIMIT_S = 600.0
_CLEARING_S = 20.0


def _main(config: str, hostfile: str, metrics: Path) -> None:
    launch = [
        sys.executable,
        "-m",
        "xformer_train.launcher",
        "launch",
        "--config",
        config,
        "--hostfile",
        hostfile,
        "--",
    ]
    first = subprocess.Popen(
        [*launch, "--max_steps", "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + _START_LIMIT_S
    while not (metrics.exists() and metrics.read_text().count("\n") >= 7) and first.poll() is None:
        if time.monotonic() > deadline:
            first.kill()
        time.sleep(0.05)
    _link("down")
    out, err = first.communicate(timeout=_END_LIMIT_S)
    left = _left(config)
    _link("up")
    steps = metrics.read_text().count("\n")
    second = subprocess.run(
        [*launch, "--resume", "auto", "--max_steps", str(steps + 2)],
        check=False,
        capture_output=True,
        text=True,
        timeout=_START_LIMIT_S,
    )
    report = {
        "exit_code": first.returncode,
        "left": left,
        "out": out,
        "err": err,
        "resumed_exit_code": second.returncode,
        "resumed_out": second.stdout,
        "resumed_err": second.stderr,
        "processes_in_the_end": _left(config),
    }
    print(json.dumps(report))


def _link(state: str) -> None:
    subprocess.run(["ip", "-n", "h2", "link", "set", "v0", state], check=True)


def _left(config: str) -> list[str]:
    """The processes of the run that do not end by themselves, once the kernel has cleared the others away."""
    deadline = time.monotonic() + _CLEARING_S
    while (left := _processes(config)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def _processes(config: str) -> list[str]:
    """The processes of the run, on both hosts, of which this one sees all."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue  # it has ended since
        if (config in line and "hosts_worker" not in line) or "host_process.py" in line:
            found.append(line)
    return found


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
