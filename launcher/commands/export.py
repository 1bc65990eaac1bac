"""`xformer-train export`: write a checkpoint for transformers."""

from pathlib import Path
from typing import Annotated

import typer

from .errors import reported_errors
from .options import RUN_HELP, DebugOption, EmaOption, IdOption, from_home


def export(
    run: Annotated[Path, typer.Option(parser=from_home, metavar="RUN", help=RUN_HELP)],
    to: Annotated[Path, typer.Option(parser=from_home, metavar="DIR", help="The folder to write.")],
    checkpoint_id: IdOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export in that folder.")] = False,
    ema: EmaOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a checkpoint as a folder that transformers loads: weights, config.json, tokenizer, model card."""
    with reported_errors(debug):
        from ..processes.topology import quiet

        quiet(debug)  # before anything that imports DeepSpeed
        from ..trained_models.export import export as write
        from ..trained_models.pretrained import find_checkpoint

        checkpoint = find_checkpoint(run, checkpoint_id)
        name = write(checkpoint, to, force=force, ema=ema)
        typer.echo(f"{checkpoint} is now {to}, a {name}{', with the mean of the weights' if ema else ''}")
