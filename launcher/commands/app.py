"""The command line: `xformer-train --config run.yaml` trains; the other commands have files of their own.

What takes long to import is imported only once a command needs it.
"""

from ..processes.console import open_missing_streams
from ..processes.rank_status import recorded
from . import doctor, export, fill_mask, launch, sample, usage
from .checkpoints import checkpoints_app
from .config import config_app
from .errors import reported_faults
from .train import app

__all__ = ["app", "main"]

app.add_typer(config_app, name="config")
app.add_typer(checkpoints_app, name="checkpoints")
app.command("launch", cls=usage.Launch)(launch.launch)
app.command("doctor")(doctor.doctor)
app.command("export")(export.export)
app.command("sample")(sample.sample)
app.command("fill-mask")(fill_mask.fill_mask)


def main() -> None:
    """Run the command line of this process and exit with its status."""
    open_missing_streams()
    with recorded(), reported_faults():
        app()
