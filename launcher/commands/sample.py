"""`xformer-train sample`: let a GPT write."""

from typing import Annotated

import typer

from .errors import reported_errors
from .options import DebugOption, EmaOption, IdOption, ModelOption


def sample(  # noqa: PLR0913, PLR0917  each parameter is an option of the command line
    run: ModelOption,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="Text to go on from.")],
    checkpoint_id: IdOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to add.")] = 50,
    temperature: Annotated[float, typer.Option(min=0.01, help="Below 1: closer to the most probable text.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Choose among so many symbols; default all.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed chooses the same text.")] = 0,
    greedy: Annotated[bool, typer.Option("--greedy", help="The most probable symbol each time.")] = False,
    ema: EmaOption = False,
    debug: DebugOption = False,
) -> None:
    """Let a GPT go on from a prompt, on the CPU."""
    with reported_errors(debug):
        from ..processes.topology import quiet

        quiet(debug)  # before anything that imports DeepSpeed
        from ..trained_models import sampling

        title, model, tokenizer = sampling.open_model(run, checkpoint_id, "sample", ema=ema)
        typer.echo(title, err=True)
        options = sampling.Sampling(max_new_tokens, temperature, top_k, seed, greedy)
        typer.echo(sampling.sample(model, tokenizer, prompt, options))  # type: ignore[arg-type]
