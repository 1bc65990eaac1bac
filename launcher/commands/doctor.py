"""`xformer-train doctor`: say whether a run can start."""

from typing import Annotated, Any

import typer

from ..processes.rank_status import USAGE_ERROR
from ..processes.words import table
from .errors import reported_errors
from .options import ConfigOption, with_hosts

_WIDTHS = (4, 24)  # room for `FAIL` and `node12 open files`; findings are printed before the longest is known


@with_hosts
def doctor(
    config: ConfigOption = None,
    *,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out the all-reduce.")] = False,
    **hosts: Any,
) -> None:
    """Say whether a run can start here, or on the hosts of a hostfile, and what to do where not.

    A line for each finding: ok, warn or FAIL, what, and the remedy. The exit status is 1 if there was a FAIL.
    """
    with reported_errors(debug=False, status=USAGE_ERROR):
        from ..machines.doctor import examine
        from ..machines.launch import LaunchOptions
        from ..reporting.run_directory import taken_text

        failed = False
        for finding in examine(LaunchOptions(**hosts), config, taken_text, quick=quick):
            typer.echo(table([finding.row], widths=_WIDTHS))
            failed |= finding.level == "FAIL"
    raise typer.Exit(int(failed))
