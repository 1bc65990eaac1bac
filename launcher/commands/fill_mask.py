"""`xformer-train fill-mask`: let a BERT fill gaps."""

from typing import Annotated

import typer

from .errors import reported_errors
from .options import DebugOption, EmaOption, IdOption, ModelOption


def fill_mask(
    text: Annotated[str, typer.Argument(metavar="TEXT", help='Text with [MASK] in it, such as "the [MASK] is open".')],
    run: ModelOption,
    checkpoint_id: IdOption = None,
    top_k: Annotated[int, typer.Option(min=1, help="Symbols to show for each mask.")] = 5,
    ema: EmaOption = False,
    debug: DebugOption = False,
) -> None:
    """Let a BERT say what stands at the masks of a text, on the CPU."""
    with reported_errors(debug):
        from ..processes.topology import quiet

        quiet(debug)  # before anything that imports DeepSpeed
        from ..trained_models import sampling

        title, model, tokenizer = sampling.open_model(run, checkpoint_id, "fill-mask", ema=ema)
        typer.echo(title, err=True)
        masks = sampling.fill_mask(model, tokenizer, text, top_k)  # type: ignore[arg-type]
        for number, candidates in enumerate(masks, start=1):
            if len(masks) > 1:
                typer.echo(f"mask {number}")
            for candidate in candidates:
                typer.echo(f"{candidate.probability:7.1%}  {candidate.text}")
