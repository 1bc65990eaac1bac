"""Options that several commands take, and the run config that they give."""

import os
from pathlib import Path
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

ModelOption = Annotated[
    Path,
    typer.Option(
        "--run", parser=from_home, metavar="RUN|DIR", help="A run directory, a checkpoint, or an exported folder."
    ),
]

HostfileOption = Annotated[
    Path | None,
    typer.Option(
        *("--hostfile", "-H"),
        parser=from_home,
        metavar="FILE",
        help="Hosts, `NAME slots=N` on each line; default this machine.",
    ),
]

IncludeOption = Annotated[str, typer.Option(metavar="HOST[:SLOT,...]@...", help="Only these hosts and slots.")]

ExcludeOption = Annotated[str, typer.Option(metavar="HOST[:SLOT,...]@...", help="All but these hosts and slots.")]

NumNodesOption = Annotated[int | None, typer.Option(min=1, help="Only the first hosts of the hostfile.")]

ProcessesOption = Annotated[
    int | None,
    typer.Option(
        "--processes",
        "--num-gpus",
        "--num-accelerators",
        min=1,
        help="Processes on each machine, one per GPU; default its slots, or all GPUs of this machine, or 1 on a CPU; also "
        "--num-gpus, --num-accelerators.",
    ),
]

LauncherOption = Annotated[
    str, typer.Option(help="How to reach hosts: ssh, or DeepSpeed's pdsh, openmpi, mpich, impi or slurm.")
]

AddressOption = Annotated[str | None, typer.Option(help="Address of the first host, for all the others.")]

PortOption = Annotated[int | None, typer.Option(min=1, max=65535, help="Port of that host where all processes meet.")]


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
