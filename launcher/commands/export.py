"""What becomes of a trained model: `xformer-train export`, `sample` and `fill-mask`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...kernels.errors import UserError
from .errors import reported_errors

if TYPE_CHECKING:
    from ...recipes.data.tokenizer import RunTokenizer
    from ..trained_models.pretrained import Pretrained

IdOption = Annotated[
    str | None, typer.Option("--id", help="A checkpoint id, or a prefix that fits one; default the newest.")
]
RunOption = Annotated[
    Path,
    typer.Option(metavar="RUN", help="A run directory, its checkpoints folder, or one checkpoint."),
]
ModelOption = Annotated[
    Path,
    typer.Option("--run", metavar="RUN|DIR", help="A run directory, a checkpoint, or an exported folder."),
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Tracebacks.")]


def export(
    run: RunOption,
    to: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")],
    checkpoint_id: IdOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export in that folder.")] = False,
    debug: DebugOption = False,
) -> None:
    """Write a checkpoint as a folder that transformers loads: weights, config.json, tokenizer, model card."""
    with reported_errors(debug):
        _quieten(debug)
        from ..trained_models.export import export as write
        from ..trained_models.pretrained import find_checkpoint

        to = to.expanduser()  # which no shell does behind --to=
        checkpoint = find_checkpoint(run, checkpoint_id)
        name = write(checkpoint, to, force=force)
        typer.echo(f"{checkpoint} is now {to}, a {name}")


def sample(  # noqa: PLR0913, PLR0917  each parameter is an option of the command line
    run: ModelOption,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="Text to go on from.")],
    checkpoint_id: IdOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to add.")] = 50,
    temperature: Annotated[float, typer.Option(min=0.01, help="Below 1: closer to the most probable text.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Choose among so many symbols; default all.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed chooses the same text.")] = 0,
    greedy: Annotated[bool, typer.Option("--greedy", help="The most probable symbol each time.")] = False,
    debug: DebugOption = False,
) -> None:
    """Let a GPT go on from a prompt, on the CPU."""
    with reported_errors(debug):
        trained = _open(run, checkpoint_id, "sample", debug)
        from ..trained_models import sampling

        options = sampling.Sampling(max_new_tokens, temperature, top_k, seed, greedy)
        typer.echo(sampling.sample(trained.build(), _tokenizer(trained, run), prompt, options))  # type: ignore[arg-type]


def fill_mask(
    text: Annotated[str, typer.Argument(metavar="TEXT", help='Text with [MASK] in it, such as "the [MASK] is open".')],
    run: ModelOption,
    checkpoint_id: IdOption = None,
    top_k: Annotated[int, typer.Option(min=1, help="Symbols to show for each mask.")] = 5,
    debug: DebugOption = False,
) -> None:
    """Let a BERT say what stands at the masks of a text, on the CPU."""
    with reported_errors(debug):
        trained = _open(run, checkpoint_id, "fill-mask", debug)
        from ..trained_models import sampling

        masks = sampling.fill_mask(trained.build(), _tokenizer(trained, run), text, top_k)  # type: ignore[arg-type]
        for number, candidates in enumerate(masks, start=1):
            if len(masks) > 1:
                typer.echo(f"mask {number}")
            for candidate in candidates:
                typer.echo(f"{candidate.probability:7.1%}  {candidate.text}")


def _open(run: Path, checkpoint_id: str | None, command: str, debug: bool) -> "Pretrained":
    """Return the model, after a line on stderr that says which it is. Raise UserError for one that has another command."""
    _quieten(debug)
    from ...recipes import RECIPES
    from ..trained_models.pretrained import open_pretrained

    trained, place = open_pretrained(run, checkpoint_id)
    model = trained.model
    own = RECIPES[model.type].command
    if own != command:
        wanted = " or ".join(name for name, recipe in RECIPES.items() if recipe.command == command)
        raise UserError(f"{place} is a {model.type}, and this command needs a {wanted}; use xformer-train {own}")
    typer.echo(f"{place}: {model.type}, {model.num_hidden_layers} layers, hidden size {model.hidden_size:,}", err=True)
    return trained


def _tokenizer(trained: "Pretrained", run: Path) -> "RunTokenizer":
    if trained.tokenizer is None:
        raise UserError(f"{run} has no tokenizer.json or vocab.txt; save its tokenizer there")
    return trained.tokenizer


def _quieten(debug: bool) -> None:
    from ..processes.topology import quiet

    quiet(debug)  # before anything that imports DeepSpeed
