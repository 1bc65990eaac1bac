"""The command line: `xformer-train --config run.yaml` trains, `xformer-train config ...` shows and checks run configs.

The other commands have modules of their own. What takes long to import is imported only once a command needs it.
"""

import json

import typer

from ..processes.rank_status import recorded
from . import doctor, export, launch
from .checkpoints import checkpoints_app
from .errors import reported_errors, reported_faults
from .train import ConfigOption, DebugOption, SetOption, app, load, world_size

__all__ = ["app", "main"]

config_app = typer.Typer(help="Show, check or describe run configs.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(checkpoints_app, name="checkpoints")
app.command("launch")(launch.launch)
app.command("doctor")(doctor.doctor)
app.command("export")(export.export)
app.command("sample")(export.sample)
app.command("fill-mask")(export.fill_mask)


def main() -> None:
    """Run the command line of this process and exit with its status."""
    with recorded(), reported_faults():
        app()


@config_app.command("show")
def show(config: ConfigOption = None, sets: SetOption = None, debug: DebugOption = False) -> None:
    """Print every key of a run config, and behind it what set it."""
    with reported_errors(debug):
        from ..config.loading import dump_config

        loaded = load(config, sets, {}, world_size(None))
        typer.echo(dump_config(loaded.config, loaded.origins), nl=False)


@config_app.command("check")
def check(config: ConfigOption = None, sets: SetOption = None, debug: DebugOption = False) -> None:
    """Say what is wrong with a run config, or how its batch is divided (over WORLD_SIZE processes; default parallel.tensor)."""
    with reported_errors(debug):
        from ..config.batch import solve_batch
        from ..config.checks import num_replicas

        loaded = load(config, sets, {}, world_size(None)).config
        batch = solve_batch(loaded.training, num_replicas(loaded, world_size(None)))
        typer.echo(
            f"{config}: valid; {batch.train_batch_size} sequences per step = micro-batch {batch.micro_batch_size} x "
            f"accumulation {batch.gradient_accumulation_steps} x replicas {batch.num_replicas}"
        )


@config_app.command("schema")
def schema() -> None:
    """Print the JSON Schema of run configs, for editors."""
    from ..config.schema import RunConfig

    typer.echo(json.dumps(RunConfig.model_json_schema(), indent=2))
