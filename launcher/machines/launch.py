"""`xformer-train launch`: the `deepspeed` command of a run on one machine or many, checked before anything is started.

The launchers that DeepSpeed has for several machines (pdsh, MPI, srun) hand arguments through shells, forward few variables,
and leave processes behind when a machine fails. `ssh`, the default, starts DeepSpeed's launcher on each machine by itself.
"""

import os
import re
import shlex
import shutil
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from ...kernels.errors import UserError, refused
from ..processes.rank_status import FOLDER_VARIABLE
from .doctor_facts import is_free
from .hostfile import Slots, choose_slots, read_hostfile
from .supervision import SSH, HostCommand, Outcome, run_hosts

Launcher = Literal["ssh", "pdsh", "openmpi", "mpich", "impi", "slurm"]
LAUNCHERS: tuple[str, ...] = get_args(Launcher)
DEFAULT_PORT = 29500
MODULE = "xformer_train.launcher"

_MPI = ("openmpi", "mpich", "impi")
# Variables that a run may depend on. What belongs to one machine, such as CUDA_VISIBLE_DEVICES, stays there.
_FORWARDED_PREFIXES = (
    *("CUDA_", "DS_", "FI_", "GLOO_", "HF_", "KMP_", "MKL_", "NCCL_", "OMP_"),
    *("PYTHON", "TOKENIZERS_", "TORCH_", "TRITON_", "UCX_", "XFORMER_TRAIN_"),
)
_FORWARDED = ("LD_LIBRARY_PATH", "VIRTUAL_ENV", "XDG_CACHE_HOME")
_NOT_FORWARDED = ("CUDA_VISIBLE_DEVICES", "DS_ENV_FILE")
_SECRET = re.compile("TOKEN|KEY|SECRET|PASSWORD")
_SAFE = re.compile(r"[\w@%+=:,./-]*")  # what DeepSpeed hands through a remote shell unchanged
_HERE = "this machine"


@dataclass(frozen=True)
class LaunchOptions:
    """Where a run is started."""

    hostfile: Path | None = None
    """None: this machine alone."""
    include: str = ""
    exclude: str = ""
    num_nodes: int | None = None
    num_gpus: int | None = None
    """Processes per machine, one for each of its GPUs; default all slots, or all GPUs of this machine."""
    launcher: str = "ssh"
    master_addr: str | None = None
    master_port: int | None = None
    launcher_args: str = ""

    def __post_init__(self) -> None:
        if self.launcher not in LAUNCHERS:
            raise UserError(f"--launcher got {self.launcher!r}, must be one of {', '.join(LAUNCHERS)}")
        if self.hostfile is None and (self.include or self.exclude or self.num_nodes):
            raise UserError("--include, --exclude and --num-nodes choose from a hostfile; give one with --hostfile")
        chosen = self.include or self.exclude or self.num_nodes or self.num_gpus
        if self.hostfile is not None and self.launcher in _MPI and chosen:
            limits = "--include, --exclude, --num-nodes and --num-gpus"
            remedy = f"write another hostfile in place of {limits}, or use --launcher ssh"
            raise UserError(f"--launcher {self.launcher} takes all of the hostfile; {remedy}")
        if self.launcher_args and (self.hostfile is None or self.launcher == "ssh"):
            remedy = "choose one with --hostfile and --launcher"
            raise UserError(f"--launcher-args go to a launcher of DeepSpeed's own; {remedy}")


@dataclass(frozen=True)
class Launch:
    """A run that is ready to be started."""

    commands: tuple[HostCommand, ...]
    world_size: int
    variables: dict[str, str] = field(default_factory=dict)
    """For a launcher of DeepSpeed's own: what it passes on to the hosts, from a file that DS_ENV_FILE names."""

    def text(self) -> str:
        """Return the commands as one would type them, one on a line for each machine that is logged in to."""
        lines = []
        for command in self.commands:
            line = shlex.join(command.command)
            if command.environment:
                shown = [shlex.quote(f"{k}={v}") for k, v in command.environment.items() if not _SECRET.search(k)]
                line = " ".join([*(["env", *shown] if shown else []), line])
            if command.remote:
                line = shlex.join([*SSH, command.host, f"cd {shlex.quote(command.directory)} && {line}"])
            lines.append(line)
        shown = [f"{k}={v}" for k, v in self.variables.items() if not _SECRET.search(k)]
        lines += [f"# in the file that DS_ENV_FILE names: {variable}" for variable in shown]
        names = [name for command in self.commands for name in command.environment] + list(self.variables)
        hidden = sorted({name for name in names if _SECRET.search(name)})
        return "\n".join([*lines, *(f"# passed on too, and not shown: {name}" for name in hidden)])


def choose_hosts(options: LaunchOptions) -> Slots | None:
    """Return the hosts and slots of the run; None without a hostfile. Raises UserError as `choose_slots` does."""
    if options.hostfile is None:
        return None
    return choose_slots(
        read_hostfile(options.hostfile),
        include=options.include,
        exclude=options.exclude,
        num_nodes=options.num_nodes,
        num_gpus=options.num_gpus,
    )


def count_processes(options: LaunchOptions, slots: Slots | None) -> int:
    """Return the number of processes of the run. Raises UserError if this machine has fewer GPUs than are asked for."""
    if slots is not None:
        return sum(map(len, slots.values()))
    devices = local_devices()
    if devices and options.num_gpus and options.num_gpus > len(devices):
        raise UserError(f"--num-gpus is {options.num_gpus}, and this machine offers {len(devices)} GPUs")
    return options.num_gpus or len(devices) or 1


def local_devices() -> list[str]:
    """Return the GPUs of this machine that a run may use; none on a CPU."""
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible and count else [str(index) for index in range(count)]


def plan_launch(options: LaunchOptions, slots: Slots | None, arguments: Sequence[str], module: str = MODULE) -> Launch:
    """Return the commands that start `python -m module arguments` in all processes.

    slots: from `choose_hosts`. Raises UserError if the hosts or the arguments do not suit the launcher.
    """
    world_size = count_processes(options, slots)
    if slots is None:
        command = [*_deepspeed(), *_local_options(options, world_size), "--module", module, *arguments]
        here = HostCommand(command, str(Path.cwd()), _defaults(), world_size, _HERE, remote=False)
        return Launch((here,), world_size)
    master = [
        *("--master_addr", options.master_addr or _master_address(next(iter(slots)))),
        *("--master_port", str(options.master_port or _meeting_port(next(iter(slots))))),
    ]
    if options.launcher == "ssh":
        return Launch(tuple(_ssh_commands(options, slots, [*master, "--module", module, *arguments])), world_size)
    variables = _defaults() | forwarded_environment(os.environ) | {"MASTER_ADDR": master[1], "MASTER_PORT": master[3]}
    _check_words(options.launcher, [*arguments, *variables.values()])
    return Launch((_multi_node_command(options, slots, master, module, arguments),), world_size, variables)


def start(launch: Launch, folder: Path) -> Outcome:
    """Run a launch to its end, and return how the run ended. Its processes report to `folder`, which all machines see."""
    with refused(f"cannot launch from {folder}", "choose another --output_dir"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".launch-", dir=folder, ignore_cleanup_errors=True) as status_folder:
            commands = launch.commands
            if launch.variables:  # for this user's eyes only, as the folder is
                variables = launch.variables | {FOLDER_VARIABLE: status_folder}
                file = Path(status_folder, "deepspeed_env")
                file.write_text("".join(f"{name}={value}\n" for name, value in variables.items()), encoding="utf-8")
                file_variable = {"DS_ENV_FILE": str(file)}
                commands = tuple(replace(one, environment=one.environment | file_variable) for one in commands)
            return run_hosts(commands, Path(status_folder), launch.world_size)


def forwarded_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that a run on another machine needs of this one's."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if (name.startswith(_FORWARDED_PREFIXES) or name in _FORWARDED) and name not in _NOT_FORWARDED
    }


def is_this_machine(host: str) -> bool:
    """Return whether the name or address is one of this machine's own."""
    try:
        addresses = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in addresses:
        with suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.bind(address)  # fails for the address of another machine
            return True
    return False


def _deepspeed() -> list[str]:
    """Return the `deepspeed` of this Python; by its name alone where PATH finds that one."""
    script = Path(sys.executable).with_name("deepspeed")
    found = shutil.which("deepspeed")
    name = "deepspeed" if found is not None and Path(found) == script else str(script)
    return [name, "--quiet", "--no_local_rank"]  # the option --local_rank would stand before a subcommand


def _defaults() -> dict[str, str]:
    """Return what keeps DeepSpeed from a search for a GPU where there is none: it prints a warning in every process."""
    return {} if local_devices() else {"DS_ACCELERATOR": "cpu"}


def _local_options(options: LaunchOptions, world_size: int) -> list[str]:
    devices = local_devices()[:world_size]
    if devices and not all(device.isdecimal() for device in devices):
        given = f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']}"
        what = "names GPUs otherwise than by number, which DeepSpeed's launcher does not understand"
        raise UserError(f"{given} {what}; give their numbers, or use torchrun")
    place = ["--include", f"localhost:{','.join(devices)}"] if devices else ["--num_accelerators", str(world_size)]
    # DeepSpeed would take /job/hostfile, where there is one.
    return ["--hostfile", os.devnull, "--master_port", str(options.master_port or free_port()), *place]


def free_port() -> int:
    """Return a port that nobody listens on: two runs on one machine must not meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _meeting_port(host: str) -> int:
    """Return the default port, or one that is free where the first host is this machine and another run has that port."""
    return DEFAULT_PORT if is_free(DEFAULT_PORT) or not is_this_machine(host) else free_port()


def _master_address(host: str) -> str:
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        what = f"host {host} has no address ({error.strerror}), where all processes meet"
        raise UserError(f"{what}; give its address with --master-addr") from error
    return host


def _hostfile_options(options: LaunchOptions) -> list[str]:
    assert options.hostfile is not None, "asked for with a hostfile only"
    given = {
        "--hostfile": options.hostfile.absolute(),
        "--include": options.include,
        "--exclude": options.exclude,
        "--num_nodes": options.num_nodes,
        "--num_gpus": options.num_gpus,
    }
    return [word for name, value in given.items() if value for word in (name, str(value))]


def _ssh_commands(options: LaunchOptions, slots: Slots, rest: Sequence[str]) -> list[HostCommand]:
    """Return a DeepSpeed launcher for each host, which starts what `slots` has there and needs no connection to the others."""
    environment = forwarded_environment({**_defaults(), **os.environ})
    path, own_folder = os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)
    if own_folder not in path.split(os.pathsep):
        path = own_folder + os.pathsep + path
    return [
        HostCommand(
            [*_deepspeed(), *_hostfile_options(options), "--no_ssh", "--node_rank", str(rank), *rest],
            str(Path.cwd()),
            {"PATH": path, **environment},
            len(own_slots),
            host,
            remote=not is_this_machine(host),
        )
        for rank, (host, own_slots) in enumerate(slots.items())
    ]


def _multi_node_command(
    options: LaunchOptions, slots: Slots, master: Sequence[str], module: str, arguments: Sequence[str]
) -> HostCommand:
    """Return one `deepspeed` that starts all hosts through a launcher of its own."""
    launcher = ["--launcher", options.launcher, "--force_multi"]
    if options.launcher_args:
        launcher.append(f"--launcher_args={options.launcher_args}")
    # DeepSpeed's launcher for Slurm ignores --module.
    own_script = str(Path(sys.executable).with_name("xformer-train"))
    script = [own_script] if options.launcher == "slurm" else ["--module", module]
    return HostCommand(
        [*_deepspeed(), *_hostfile_options(options), *launcher, *master, *script, *arguments],
        str(Path.cwd()),
        # pdsh waits for ever for a host that is cut off, unless ssh notices.
        {"PDSH_SSH_ARGS_APPEND": " ".join(SSH[1:])} if options.launcher == "pdsh" else {},
        max(map(len, slots.values())),
        _HERE,
        remote=False,
        through_pdsh=options.launcher == "pdsh",
    )


def _check_words(launcher: str, words: Sequence[str]) -> None:
    """Raise UserError for a word that would be another one, or several, behind DeepSpeed's way to the hosts."""
    for word in words:
        if not _SAFE.fullmatch(word) or (launcher == "pdsh" and "%" in word):
            what = f"--launcher {launcher}, which hands arguments and environment variables to a shell"
            remedy = "write it into the run config, unset the variable, or use --launcher ssh"
            raise UserError(f"{word!r} would not come through {what}; {remedy}")
