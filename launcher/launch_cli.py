"""The commands around a run on several machines: `xformer-train launch` and `xformer-train doctor`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_errors import reported_errors
from .flags import values_by_key

ConfigOption = Annotated[
    Path, typer.Option("--config", "--config-file", "--cf", metavar="FILE", help="The run config.")
]
HostfileOption = Annotated[
    Path | None,
    typer.Option("--hostfile", "-H", metavar="FILE", help="Hosts, `NAME slots=N` on each line; default this machine."),
]
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
PortOption = Annotated[int | None, typer.Option(min=1, max=65535, help="Port of that host where all processes meet.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Tracebacks.")]


def launch(  # noqa: PLR0913, PLR0917  each parameter is an option of the command line
    config: ConfigOption,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="-- [OPTIONS]", help="Options of training, such as -- --max_steps 10.")
    ] = None,
    hostfile: HostfileOption = None,
    include: Annotated[str, typer.Option(metavar="HOST[:SLOT,...]@...", help="Only these hosts and slots.")] = "",
    exclude: Annotated[str, typer.Option(metavar="HOST[:SLOT,...]@...", help="All but these hosts and slots.")] = "",
    num_nodes: Annotated[int | None, typer.Option(min=1, help="Only the first hosts of the hostfile.")] = None,
    num_gpus: ProcessesOption = None,
    launcher: Annotated[
        str, typer.Option(help="How to reach hosts: ssh, or DeepSpeed's pdsh, openmpi, mpich, impi or slurm.")
    ] = "ssh",
    master_addr: Annotated[str | None, typer.Option(help="Address of the first host, for all the others.")] = None,
    master_port: PortOption = None,
    launcher_args: Annotated[str, typer.Option(help="Passed on to pdsh, mpirun or srun.")] = "",
    print_only: Annotated[bool, typer.Option("--print", help="Show the commands, and start nothing.")] = False,
    debug: DebugOption = False,
) -> None:
    """Train on this machine's GPUs, or on the hosts of a hostfile.

    The run config is checked first, for the number of processes that the hosts have. The exit status is 0 only if every process
    ended well; otherwise the first one to fail is named last, with its traceback.
    """
    with reported_errors(debug):
        from .config_loading import load_config
        from .launch import LaunchOptions, choose_hosts, count_processes, plan_launch, start

        options = LaunchOptions(
            hostfile, include, exclude, num_nodes, num_gpus, launcher, master_addr, master_port, launcher_args
        )
        slots = choose_hosts(options)
        arguments = ["--config", str(config), *(overrides or ())]
        path, sets, flags = _training_options(arguments)
        loaded = load_config(path, sets, flags, count_processes(options, slots))
        planned = plan_launch(options, slots, arguments)
        if print_only:
            typer.echo(planned.text())
            return
        outcome = start(planned, loaded.config)
    if outcome.text:
        typer.echo(outcome.text, err=True)
    raise typer.Exit(outcome.exit_code)


def _training_options(arguments: list[str]) -> tuple[Path, list[str], dict[str, Any]]:
    """The config file, --set texts and values by key in the options of a training command, which are checked so far."""
    from .cli import app

    context = typer.main.get_command(app).make_context("xformer-train", list(arguments))  # which it empties
    words = [*getattr(context, "_protected_args", ()), *context.args]
    if words:
        raise ValueError(f"got {words[0]!r} behind --, must be options of training, such as --max_steps 10")
    values = dict(context.params)
    return values.pop("config"), values.pop("sets") or [], values_by_key(values)
