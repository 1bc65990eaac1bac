"""`xformer-train --config run.yaml`, the command that trains, and its options; `app.py` adds the other commands to `app`.

Torch, DeepSpeed and pydantic are imported only once a command needs them, so that `--help` is quick.
"""

from collections.abc import Callable
from importlib import metadata
from typing import Annotated, Any

import typer

from ..config.flags import FLAGS, values_by_key
from .errors import leave, reported_errors, requeued_by_signals
from .options import ConfigOption, DebugOption, SetOption, load, with_options
from .usage import Commands

FLAGS_PANEL = "Flags of keys, those of DeepSpeed's BERT recipe too (with underscores or hyphens)"
SPELLING = {"token_normalize_func": lambda token: token.replace("_", "-"), "help_option_names": ["-h", "--help"]}

app = typer.Typer(name="xformer-train", cls=Commands, pretty_exceptions_enable=False, context_settings=SPELLING)


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with one keyword parameter for each row of FLAGS in the place of its `**flags`."""
    panel: dict[str, Any] = {"rich_help_panel": FLAGS_PANEL, "show_default": False}
    options = {flag.parameter: typer.Option(*flag.names, help=flag.help_text, **panel) for flag in FLAGS}
    return with_options(command, {flag.parameter: (flag.kind | None, options[flag.parameter]) for flag in FLAGS})


def _show_version(asked: bool) -> None:
    """Print the versions that a report of a fault needs."""
    if asked:
        packages = ("xformer-train", "torch", "deepspeed")
        typer.echo(", ".join(f"{package} {metadata.version(package)}" for package in packages))
        raise typer.Exit


@app.callback(invoke_without_command=True)
@with_flags
def train(
    context: typer.Context,
    config: ConfigOption = None,
    sets: SetOption = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="auto", help="Continue the run directory where it has checkpoints, else start."),
    ] = None,
    debug: DebugOption = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the versions, and leave.")
    ] = False,
    **flags: Any,
) -> None:
    """Pretrain a BERT or a GPT from a run config.

    Each key has a default, which the file changes, which --set changes, which the flags below change.
    """
    values = values_by_key(flags)
    if context.invoked_subcommand is not None:
        if config or sets or resume or values:
            what = f"options of {context.invoked_subcommand} stand behind it, and those of training have no effect"
            leave(f"error: {what}", status=2)
        return
    _check_resume(resume)
    with requeued_by_signals(), reported_errors(debug):
        loaded = load(config, sets, values, 1)
        from ..processes.console import quieten_libraries, say
        from ..processes.rank_status import process_rank

        if process_rank() in (None, "0"):
            say(f"run {loaded.config.name}: loading PyTorch and DeepSpeed")
        if not debug:
            quieten_libraries()
        from ..processes.topology import quiet

        quiet(debug)  # before `train`, which imports DeepSpeed
        from ..training.train import run

        status = run(loaded, resume=resume == "auto")
    raise typer.Exit(status)


def training_options(arguments: list[str]) -> tuple[dict[str, Any], bool]:
    """Return the arguments of `load_config` that a command line with --config gives, and whether it has --resume.

    The process ends with status 2 where an option is wrong.
    """
    context = typer.main.get_command(app).make_context("xformer-train", list(arguments))  # which it empties
    words = [*getattr(context, "_protected_args", ()), *context.args]
    if words:
        leave(f"error: got {words[0]!r} behind --, must be options of training, such as --max_steps 10", status=2)
    given = context.params
    _check_resume(given["resume"])
    files = {"path": given["config"], "sets": given["sets"] or (), "flags": values_by_key(given)}
    return files, given["resume"] == "auto"


def _check_resume(resume: str | None) -> None:
    if resume not in (None, "auto"):
        remedy = "--load_training_checkpoint DIR --load_checkpoint_id ID loads a certain checkpoint"
        leave(f"error: --resume got {resume!r}, must be auto; {remedy}", status=2)
