"""`xformer-train config ...`: show, check or describe run configs. No torch."""

import json
from typing import Any

import typer

from ..config.flags import values_by_key
from .errors import reported_errors
from .options import ConfigOption, DebugOption, SetOption, load, world_size
from .train import with_flags

config_app = typer.Typer(help="Show, check or describe run configs.", no_args_is_help=True)


@config_app.command("show")
@with_flags
def show(config: ConfigOption = None, sets: SetOption = None, debug: DebugOption = False, **flags: Any) -> None:
    """Print every key of a run config, each with what set it."""
    with reported_errors(debug):
        from ..config.loading import dump_config

        loaded = load(config, sets, values_by_key(flags), None)
        typer.echo(dump_config(loaded.config, loaded.origins), nl=False)


@config_app.command("check")
@with_flags
def check(config: ConfigOption = None, sets: SetOption = None, debug: DebugOption = False, **flags: Any) -> None:
    """Say what is wrong with a run config, or how its batch is divided (over WORLD_SIZE processes; default parallel.tensor).

    The files and folders that it names must be there. That its run directory holds a run already is only a warning.
    """
    with reported_errors(debug):
        from ..config.checks import num_replicas
        from ..config.file import ConfigError, printable
        from ..config.paths import missing_paths
        from ..config.phases import Phases
        from ..reporting.run_directory import taken_text

        found = load(config, sets, values_by_key(flags), None)
        missing = missing_paths(found)
        if missing:
            raise ConfigError(missing)
        loaded = found.config
        plan = Phases(loaded, num_replicas(loaded, world_size(None)))
        batch, warmup = plan.all[0].batch, plan.warmup_text()
        divided = (
            f"{printable(str(config))}: valid; {batch.train_batch_size} sequences per step = micro-batch "
            f"{batch.micro_batch_size} x accumulation {batch.gradient_accumulation_steps} x replicas {batch.num_replicas}"
        )
        typer.echo(f"{divided}, {warmup}" if warmup else divided)
        for phase in plan.all if len(plan.all) > 1 else []:
            typer.echo(f"  {plan.text(phase)}")
        taken = taken_text(loaded)
        if taken:
            typer.echo(f"warning: {taken}", err=True)


@config_app.command("schema")
def schema() -> None:
    """Print the JSON Schema of run configs, for editors."""
    from ..config.schema import RunConfig

    typer.echo(json.dumps(RunConfig.model_json_schema(), indent=2))
