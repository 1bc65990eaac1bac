"""Options that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

HostfileOption = Annotated[
    Path | None,
    typer.Option("--hostfile", "-H", metavar="FILE", help="Hosts, `NAME slots=N` on each line; default this machine."),
]


IncludeOption = Annotated[str, typer.Option(metavar="HOST[:SLOT,...]@...", help="Only these hosts and slots.")]


ExcludeOption = Annotated[str, typer.Option(metavar="HOST[:SLOT,...]@...", help="All but these hosts and slots.")]


NumNodesOption = Annotated[int | None, typer.Option(min=1, help="Only the first hosts of the hostfile.")]


ProcessesOption = Annotated[
    int | None,
    typer.Option(
        "--num-gpus",
        "--num-accelerators",
        "--processes",
        min=1,
        help="Processes on each machine, one per GPU; default its slots, or all GPUs of this machine, or 1 on a CPU.",
    ),
]


LauncherOption = Annotated[
    str, typer.Option(help="How to reach hosts: ssh, or DeepSpeed's pdsh, openmpi, mpich, impi or slurm.")
]


AddressOption = Annotated[str | None, typer.Option(help="Address of the first host, for all the others.")]


PortOption = Annotated[int | None, typer.Option(min=1, max=65535, help="Port of that host where all processes meet.")]
