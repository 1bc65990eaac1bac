"""The commands around a run on several machines: `xformer-train launch` and `xformer-train doctor`."""

from pathlib import Path
from typing import Annotated

import typer

from .cli_errors import reported_errors, requeued_by_signals
from .processes.rank_status import USAGE_ERROR
from .train_cli import training_options

ConfigOption = Annotated[
    Path, typer.Option("--config", "--config-file", "--cf", metavar="FILE", help="The run config.")
]
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
DebugOption = Annotated[bool, typer.Option("--debug", help="Tracebacks.")]

_WHAT_WIDTH = 24  # room for `node12 open files`; findings are printed before the longest is known


def launch(  # noqa: PLR0913, PLR0917  each parameter is an option of the command line
    config_file: ConfigOption,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="-- [OPTIONS]", help="Options of training, such as -- --max_steps 10.")
    ] = None,
    hostfile: HostfileOption = None,
    include: IncludeOption = "",
    exclude: ExcludeOption = "",
    num_nodes: NumNodesOption = None,
    num_gpus: ProcessesOption = None,
    launcher: LauncherOption = "ssh",
    master_addr: AddressOption = None,
    master_port: PortOption = None,
    launcher_args: Annotated[str, typer.Option(help="Passed on to pdsh, mpirun or srun.")] = "",
    max_restarts: Annotated[
        int,
        typer.Option(min=0, help="Starts after a failure, each with --resume auto, from the newest whole checkpoint."),
    ] = 0,
    print_only: Annotated[bool, typer.Option("--print", help="Show the commands, and start nothing.")] = False,
    debug: DebugOption = False,
) -> None:
    """Train on this machine's GPUs, or on the hosts of a hostfile.

    The run config is checked first, for the number of processes that the hosts have. The exit status is 0 only if every process
    ended well; otherwise the first one to fail is named last, with its traceback.
    """
    with requeued_by_signals(), reported_errors(debug, USAGE_ERROR):
        from .config.loading import load_config
        from .machines.launch import LaunchOptions, choose_hosts, count_processes, plan_launch, start
        from .reporting.run_directory import check_run_directory

        options = LaunchOptions(
            hostfile, include, exclude, num_nodes, num_gpus, launcher, master_addr, master_port, launcher_args
        )
        slots = choose_hosts(options)
        arguments = ["--config", str(config_file), *(overrides or ())]
        training = training_options(arguments)
        config = load_config(training.config, training.sets, training.flags, count_processes(options, slots)).config
        planned = plan_launch(options, slots, arguments)
    if print_only:
        typer.echo(planned.text())
        return
    with requeued_by_signals(), reported_errors(debug):
        # Each process would find another run's directory too, but a restart would then go on with that run.
        folder = check_run_directory(config, resume=training.resume).log.absolute()
        outcome = start(planned, folder)
        resuming = arguments if training.resume else [*arguments, "--resume", "auto"]
        for restart in range(1, max_restarts + 1):
            if not outcome.may_start_again:
                break
            typer.echo(f"{outcome.text}\nrestart {restart} of {max_restarts}, with --resume auto", err=True)
            outcome = start(plan_launch(options, slots, resuming), folder)
    if outcome.text:
        typer.echo(outcome.text, err=True)
    raise typer.Exit(outcome.exit_code)


def doctor(  # noqa: PLR0913, PLR0917  each parameter is an option of the command line
    config: Annotated[
        Path | None,
        typer.Option("--config", "--config-file", "--cf", metavar="FILE", help="The run config, if there is one."),
    ] = None,
    hostfile: HostfileOption = None,
    include: IncludeOption = "",
    exclude: ExcludeOption = "",
    num_nodes: NumNodesOption = None,
    num_gpus: ProcessesOption = None,
    launcher: LauncherOption = "ssh",
    master_addr: AddressOption = None,
    master_port: PortOption = None,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out the all-reduce.")] = False,
) -> None:
    """Say whether a run can start here, or on the hosts of a hostfile, and what to do where not.

    A line for each finding: ok, warn or FAIL, what, and the remedy. The exit status is 1 if there was a FAIL.
    """
    with reported_errors(debug=False, status=USAGE_ERROR):
        from .machines.doctor import Examination, examine, line
        from .machines.launch import LaunchOptions

        options = LaunchOptions(hostfile, include, exclude, num_nodes, num_gpus, launcher, master_addr, master_port)
        failed = False
        for finding in examine(Examination(options, config, quick)):
            typer.echo(line(finding, _WHAT_WIDTH))
            failed |= finding.level == "FAIL"
    raise typer.Exit(int(failed))
