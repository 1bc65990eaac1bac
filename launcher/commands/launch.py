"""`xformer-train launch`: train on the GPUs of this machine, or on several machines."""

from typing import Annotated, Any

import typer

from ..processes.rank_status import USAGE_ERROR
from .errors import reported_errors, requeued_by_signals
from .options import DebugOption, RequiredConfigOption, with_hosts
from .train import training_options


@with_hosts
def launch(
    config_file: RequiredConfigOption,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="-- [OPTIONS]", help="Options of training, such as -- --max_steps 10.")
    ] = None,
    *,
    launcher_args: Annotated[str, typer.Option(help="Passed on to pdsh, mpirun or srun.")] = "",
    max_restarts: Annotated[
        int,
        typer.Option(min=0, help="Starts after a failure, each with --resume auto, from the newest whole checkpoint."),
    ] = 0,
    print_only: Annotated[bool, typer.Option("--print", help="Show the commands, and start nothing.")] = False,
    debug: DebugOption = False,
    **hosts: Any,
) -> None:
    """Train on this machine's GPUs, or on the hosts of a hostfile.

    The run config is checked first, for the number of processes that the hosts have. The exit status is 0 only if every process
    ended well; otherwise the first one to fail is named last, with its traceback.
    """
    with requeued_by_signals(), reported_errors(debug, USAGE_ERROR):
        from ..config.loading import load_config
        from ..machines.launch import LaunchOptions, choose_hosts, count_processes, plan_launch, start
        from ..reporting.run_directory import check_run_directory

        options = LaunchOptions(**hosts, launcher_args=launcher_args)
        slots = choose_hosts(options)
        arguments = ["--config", str(config_file), *(overrides or ())]
        files, resume = training_options(arguments)
        config = load_config(**files, world_size=count_processes(options, slots)).config
        planned = plan_launch(options, slots, arguments)
    if print_only:
        typer.echo(planned.text())
        return
    with requeued_by_signals(), reported_errors(debug):
        # Each process would find another run's directory too, but a restart would then go on with that run.
        folder = check_run_directory(config, resume=resume).log.absolute()
        outcome = start(planned, folder)
        resuming = arguments if resume else [*arguments, "--resume", "auto"]
        for restart in range(1, max_restarts + 1):
            if not outcome.may_start_again:
                break
            typer.echo(f"{outcome.text}\nrestart {restart} of {max_restarts}, with --resume auto", err=True)
            outcome = start(plan_launch(options, slots, resuming), folder)
    if outcome.text:
        typer.echo(outcome.text, err=True)
    raise typer.Exit(outcome.exit_code)
