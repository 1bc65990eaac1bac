"""Two hosts on one machine: network namespaces with an address and an sshd each. Started as a script, as root.

    python two_hosts.py FOLDER COMMAND...      runs COMMAND on the first host; keys, logs and the hostfile are in FOLDER

COMMAND finds `ssh` first on PATH, which knows the key, and may cut the second host off: `ip -n h2 link set v0 down`. Everything
runs in namespaces of its own, which the kernel clears away when this script's process ends, however it does.
"""

import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ADDRESSES = {"h1": "10.77.0.1", "h2": "10.77.0.2"}
_UNSHARE = ("unshare", "--net", "--pid", "--mount", "--uts", "--fork", "--kill-child", "--mount-proc")
_PATH = f"{os.environ.get('PATH', os.defpath)}{os.pathsep}/usr/sbin{os.pathsep}/sbin"


def reason_to_skip() -> str | None:
    """Why there can be no two hosts on this machine; None where there can."""
    if platform.system() != "Linux" or os.geteuid() != 0:
        return "two hosts on one machine take network namespaces, which only root of a Linux may make"
    missing = [
        tool for tool in ("ip", "unshare", "sshd", "ssh", "ssh-keygen") if shutil.which(tool, path=_PATH) is None
    ]
    if missing:
        return f"two hosts on one machine take {', '.join(missing)}, not installed"
    tried = subprocess.run(
        [*_UNSHARE, "ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1"], check=False, capture_output=True
    )
    if tried.returncode:
        return f"network namespaces are not permitted: {tried.stderr.decode().strip()}"
    return None


def command(folder: Path, *words: str) -> list[str]:
    """What runs `words` on the first of two hosts."""
    return [*_UNSHARE, sys.executable, __file__, str(folder), *words]


def _main(folder: Path, words: list[str]) -> int:
    os.environ["PATH"] = _PATH
    for mounted in (Path("/run/netns"), Path("/run/sshd")):
        mounted.mkdir(parents=True, exist_ok=True)
    _run("mount", "-t", "tmpfs", "tmpfs", "/run/netns")
    for key in ("host_key", "user_key"):
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
    for host in ADDRESSES:
        _run("ip", "netns", "add", host)
    _run("ip", "link", "add", "v0", "netns", "h1", "type", "veth", "peer", "name", "v0", "netns", "h2")
    for host, address in ADDRESSES.items():
        _run("ip", "-n", host, "link", "set", "lo", "up")
        _run("ip", "-n", host, "addr", "add", f"{address}/24", "dev", "v0")
        _run("ip", "-n", host, "link", "set", "v0", "up")
        _start_sshd(folder, host, address)
    (folder / "hosts").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES.values()))
    _write_ssh(folder)
    os.environ["PATH"] = f"{folder / 'bin'}{os.pathsep}{_PATH}"
    _wait_for_sshd()
    # gloo listens on the address that the host's name has, and these hosts' names have none.
    return subprocess.call(["ip", "netns", "exec", "h1", *words], env={**os.environ, "GLOO_SOCKET_IFNAME": "v0"})


def _run(*words: str) -> None:
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL)


def _start_sshd(folder: Path, host: str, address: str) -> None:
    settings = {
        "ListenAddress": address,
        "HostKey": folder / "host_key",
        "AuthorizedKeysFile": folder / "user_key.pub",
        "PidFile": "none",
        "UsePAM": "no",
        "StrictModes": "no",
        "PasswordAuthentication": "no",
        "PermitRootLogin": "prohibit-password",
    }
    file = folder / f"sshd_{host}"
    file.write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    # Each with processes of its own, so that what runs on a host can be counted and cannot be killed from the other.
    inside = ["unshare", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc"]
    with (folder / f"sshd_{host}.log").open("w") as log:
        subprocess.Popen(
            [
                "ip",
                "netns",
                "exec",
                host,
                *inside,
                "sh",
                "-c",
                f"hostname {host}; exec $(command -v sshd) -D -e -f {file}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def _write_ssh(folder: Path) -> None:
    """An `ssh` that knows the way to the hosts, and leaves the user's own settings alone."""
    (folder / "bin").mkdir()
    script = folder / "bin" / "ssh"
    options = f"-F none -i {folder / 'user_key'} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    script.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} {options} "$@"\n')
    script.chmod(0o755)


def _wait_for_sshd() -> None:
    deadline = time.monotonic() + 120
    for address in ADDRESSES.values():
        while subprocess.call(["ip", "netns", "exec", "h1", "ssh", "-o", "ConnectTimeout=2", address, "true"]):
            if time.monotonic() > deadline:
                raise SystemExit(f"no sshd answers at {address}")
            time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1]), sys.argv[2:]))
