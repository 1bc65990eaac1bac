"""Options that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

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
