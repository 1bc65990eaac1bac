"""`xformer-train config ...`: show, check or describe run configs. No torch."""

import json

import typer

from .errors import reported_errors
from .options import ConfigOption, DebugOption, SetOption
from .train import load, world_size

config_app = typer.Typer(help="Show, check or describe run configs.", no_args_is_help=True)


@config_app.command("show")
def show(config: ConfigOption = None, sets: SetOption = None, debug: DebugOption = False) -> None:
    """Print every key of a run config, each with what set it."""
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
        from ..config.file import printable

        loaded = load(config, sets, {}, world_size(None)).config
        batch = solve_batch(loaded.training, num_replicas(loaded, world_size(None)))
        typer.echo(
            f"{printable(str(config))}: valid; {batch.train_batch_size} sequences per step = micro-batch "
            f"{batch.micro_batch_size} x accumulation {batch.gradient_accumulation_steps} x replicas {batch.num_replicas}"
        )


@config_app.command("schema")
def schema() -> None:
    """Print the JSON Schema of run configs, for editors."""
    from ..config.schema import RunConfig

    typer.echo(json.dumps(RunConfig.model_json_schema(), indent=2))
