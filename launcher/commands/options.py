"""Options that several commands take, and the run config that they give."""

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...kernels.errors import UserError
from .errors import leave

if TYPE_CHECKING:
    from ..config.loading import LoadedConfig

RUN_HELP = "A run directory, its checkpoints folder, or one checkpoint."


def from_home(text: str) -> Path:
    """Return a path with its `~` replaced by the home folder, which no shell does after `--option=`."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise typer.BadParameter(f"{text}: {error}") from None


_CONFIG = typer.Option(
    *("--config", "--config-file", "--cf"),
    parser=from_home,
    metavar="FILE",
    help="The run config, YAML or JSON; also --config-file, --cf.",
)

ConfigOption = Annotated[Path | None, _CONFIG]

RequiredConfigOption = Annotated[Path, _CONFIG]

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key, such as training.max_steps=100; may be repeated."),
]

DebugOption = Annotated[bool, typer.Option("--debug", help="Show tracebacks, and all that DeepSpeed has to say.")]

IdOption = Annotated[
    str | None, typer.Option("--id", help="A checkpoint id, or a prefix that fits one; default latest.")
]

EmaOption = Annotated[
    bool, typer.Option("--ema", help="The mean of the weights, of a run with training.ema_decay, in their place.")
]

ModelOption = Annotated[
    Path,
    typer.Option(
        "--run", parser=from_home, metavar="RUN|DIR", help="A run directory, a checkpoint, or an exported folder."
    ),
]

_HOSTFILE_HELP = "Hosts, `NAME slots=N` on each line; default this machine."
_PROCESSES = ("--processes", "--num-gpus", "--num-accelerators")
_PROCESSES_HELP = (
    "Processes on each machine, one per GPU; default its slots, or all GPUs of this machine, or 1 on a CPU; also "
    "--num-gpus, --num-accelerators."
)
_SLOTS = "HOST[:SLOT,...]@..."
_HOW = "How to reach hosts: ssh, or DeepSpeed's pdsh, openmpi, mpich, impi or slurm."
# By field of `LaunchOptions`.
_HOST_OPTIONS = {
    "hostfile": (Path | None, typer.Option("--hostfile", "-H", parser=from_home, metavar="FILE", help=_HOSTFILE_HELP)),
    "include": (str, typer.Option(metavar=_SLOTS, help="Only these hosts and slots.")),
    "exclude": (str, typer.Option(metavar=_SLOTS, help="All but these hosts and slots.")),
    "num_nodes": (int | None, typer.Option(min=1, help="Only the first hosts of the hostfile.")),
    "num_gpus": (int | None, typer.Option(*_PROCESSES, min=1, help=_PROCESSES_HELP)),
    "launcher": (str, typer.Option(help=_HOW)),
    "master_addr": (str | None, typer.Option(help="Address of the first host, for all the others.")),
    "master_port": (int | None, typer.Option(min=1, max=65535, help="Port of that host where all processes meet.")),
}


def with_hosts(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with the options that choose hosts, the fields of `LaunchOptions`, in the place of `**hosts`."""
    return with_options(command, _HOST_OPTIONS, {"include": "", "exclude": "", "launcher": "ssh"})


def with_options(
    command: Callable[..., None],
    options: Mapping[str, tuple[Any, Any]],
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> Callable[..., None]:
    """Return the command with a parameter for each option, by name its type and what typer says of it.

    They stand in the place of the command's last, `**anything`, and behind those that it takes by position.
    """
    signature = inspect.signature(command)
    own = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    added = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=defaults.get(name), annotation=Annotated[kind, option]
        )
        for name, (kind, option) in options.items()
    ]
    first = [parameter for parameter in own if parameter.kind is not parameter.KEYWORD_ONLY]
    command.__signature__ = signature.replace(parameters=[*first, *added, *own[len(first) :]])  # type: ignore[attr-defined]
    return command


def load(config: Path | None, sets: list[str] | None, flags: dict[str, Any], default: int | None) -> "LoadedConfig":
    """Return the run config that these options give. It is checked for `world_size(default)` processes."""
    if config is None:
        leave("error: no run config is given; use --config FILE, or --help", status=2)
    from ..config.loading import load_config

    return load_config(config, sets or (), flags, world_size(default))


def world_size(default: int | None) -> int | None:
    """Return the number of processes that a launcher started, `default` without a launcher."""
    text = os.environ.get("WORLD_SIZE")
    if text is None:
        return default
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"environment variable WORLD_SIZE is {text!r}, must be a number of processes, 1 or more")
    return int(text)
