"""The command line: `xformer-train --config run.yaml` trains, `xformer-train config ...` shows and checks run configs.

Torch, DeepSpeed and pydantic are imported only once a command needs them, so that `--help` is quick.
"""

import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import export_cli, launch_cli
from .checkpoints_cli import checkpoints_app
from .cli_errors import leave, reported_errors
from .flags import FLAGS, values_by_key
from .rank_status import recorded

if TYPE_CHECKING:
    from .config_loading import LoadedConfig

TUTORIAL_PANEL = "Flags of DeepSpeed's BERT recipe (with underscores or hyphens)"
SPELLING = {"token_normalize_func": lambda token: token.replace("_", "-"), "help_option_names": ["-h", "--help"]}

app = typer.Typer(name="xformer-train", add_completion=False, pretty_exceptions_enable=False, context_settings=SPELLING)
config_app = typer.Typer(help="Show, check or describe run configs.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(checkpoints_app, name="checkpoints")
app.command("launch")(launch_cli.launch)
app.command("doctor")(launch_cli.doctor)
app.command("export")(export_cli.export)
app.command("sample")(export_cli.sample)
app.command("fill-mask")(export_cli.fill_mask)

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "--config-file", "--cf", metavar="FILE", help="The run config, YAML or JSON."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key, such as training.max_steps=100; may be repeated."),
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Tracebacks, and all that DeepSpeed has to say.")]


def main() -> None:
    """Runs the command line of this process and exits with its status."""
    with recorded():
        app()


def _with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """The command with one keyword parameter for each row of FLAGS in the place of its `**flags`."""
    signature = inspect.signature(command)
    own = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    flags = [
        inspect.Parameter(
            flag.parameter,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                flag.kind | None,
                typer.Option(
                    *flag.names,
                    help=f"{flag.help} ({flag.key})" if flag.key else flag.help,
                    rich_help_panel=TUTORIAL_PANEL,
                    show_default=False,
                ),
            ],
        )
        for flag in FLAGS
    ]
    command.__signature__ = signature.replace(parameters=[*own, *flags])  # type: ignore[attr-defined]
    return command


@app.callback(invoke_without_command=True)
@_with_flags
def train(
    context: typer.Context,
    config: ConfigOption = None,
    sets: SetOption = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="auto", help="Continue the run directory where it has checkpoints, else start."),
    ] = None,
    debug: DebugOption = False,
    **flags: Any,
) -> None:
    """Pretrain a BERT or a GPT from a run config.

    Each key has a default, which the file changes, which --set changes, which the flags below change.
    """
    values = values_by_key(flags)
    if context.invoked_subcommand is not None:
        if config or sets or resume or values:
            leave(
                f"error: options of {context.invoked_subcommand} stand behind it, and those of training have no effect",
                2,
            )
        return
    if config is None:
        leave("error: no run config is given; use --config FILE, or --help", status=2)
    if resume not in (None, "auto"):
        leave(
            f"error: --resume got {resume!r}, must be auto; --load_training_checkpoint DIR --load_checkpoint_id ID loads a "
            "certain checkpoint",
            status=2,
        )
    with reported_errors(debug):
        loaded = _load(config, sets, values, _world_size(1))
        if not debug:
            _quieten_libraries()
        from .topology import quiet

        quiet(debug)  # before `train`, which imports DeepSpeed
        from .train import run

        status = run(loaded, resume=resume == "auto")
    raise typer.Exit(status)


@config_app.command("show")
def show(config: ConfigOption = None, sets: SetOption = None, debug: DebugOption = False) -> None:
    """Print every key of a run config, and behind it what set it."""
    with reported_errors(debug):
        from .config_loading import dump_config

        loaded = _load(config, sets, {}, _world_size(None))
        typer.echo(dump_config(loaded.config, loaded.origins), nl=False)


@config_app.command("check")
def check(config: ConfigOption = None, sets: SetOption = None, debug: DebugOption = False) -> None:
    """Say what is wrong with a run config, or how its batch is divided (over WORLD_SIZE processes; default parallel.tensor)."""
    with reported_errors(debug):
        from .batch import solve_batch
        from .config_checks import num_replicas

        loaded = _load(config, sets, {}, _world_size(None)).config
        batch = solve_batch(loaded.training, num_replicas(loaded, _world_size(None)))
        typer.echo(
            f"{config}: valid; {batch.train_batch_size} sequences per step = micro-batch {batch.micro_batch_size} x "
            f"accumulation {batch.gradient_accumulation_steps} x replicas {batch.num_replicas}"
        )


@config_app.command("schema")
def schema() -> None:
    """Print the JSON Schema of run configs, for editors."""
    from .config import RunConfig

    typer.echo(json.dumps(RunConfig.model_json_schema(), indent=2))


def _load(config: Path | None, sets: list[str] | None, flags: dict[str, Any], world_size: int | None) -> "LoadedConfig":
    if config is None:
        leave("error: no run config is given; use --config FILE, or --help", status=2)
    from .config_loading import load_config

    return load_config(config, sets or (), flags, world_size)


def _world_size(default: int | None) -> int | None:
    """The number of processes that a launcher started."""
    text = os.environ.get("WORLD_SIZE")
    if text is None:
        return default
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"environment variable WORLD_SIZE is {text!r}, must be a number of processes, 1 or more")
    return int(text)


def _quieten_libraries() -> None:
    """Silences what PyTorch and DeepSpeed say of themselves on import and at start."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not sys.warnoptions:
        for module in ("torch", "deepspeed"):
            for category in (FutureWarning, DeprecationWarning):
                warnings.filterwarnings("ignore", category=category, module=rf"{module}(\.|$)")
