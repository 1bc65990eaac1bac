"""`xformer-train checkpoints ...`: what a run has saved, whether it is whole, and what may go. No torch.

Exit codes: 0; 1 for a damaged checkpoint, one that is not there, or a refusal of the system; 2 for wrong usage.
"""

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from ...kernels.errors import UserError, refused
from ..checkpoint import store
from ..processes.words import size, table
from .errors import leave, reported_errors
from .options import RUN_HELP, DebugOption, IdOption, from_home

checkpoints_app = typer.Typer(help="List, describe, verify or remove the checkpoints of a run.", no_args_is_help=True)

RunArgument = Annotated[Path, typer.Argument(parser=from_home, metavar="RUN", help=RUN_HELP)]


@checkpoints_app.command("ls")
def list_checkpoints(run: RunArgument, debug: DebugOption = False) -> None:
    """List the checkpoints by step: size, time, and what is damaged, as far as that shows without reading the files."""
    with reported_errors(debug):
        folder = _folder(run)
        newest = store.latest_id(folder)
        rows = [("ID", "STEP", "SAMPLES", "SIZE", "SAVED", "")]
        for entry in store.entries(folder):
            if entry.state is None:
                rows.append((entry.id, "", "", "", "", f"damaged: {entry.problem}"))
                continue
            problems = store.damage(folder / entry.id, entry.state["files"], contents=False)
            note = f"damaged: {', '.join(problems)}" if problems else "latest" if entry.id == newest else ""
            samples = f"{entry.state['samples']:,}" if "samples" in entry.state else ""
            size_and_time = (size(_bytes(entry.state)), _time(entry.state))
            rows.append((entry.id, f"{entry.state['step']:,}", samples, *size_and_time, note))
        typer.echo(table(rows, header=True))


@checkpoints_app.command("inspect")
def inspect(run: RunArgument, checkpoint_id: IdOption = None, debug: DebugOption = False) -> None:
    """Describe one checkpoint: where the run stood, its model, the processes that wrote it, its files."""
    with reported_errors(debug):
        checkpoint = _checkpoint(run, checkpoint_id)
        typer.echo(_description(checkpoint, store.read_state(checkpoint)))


@checkpoints_app.command("verify")
def verify(
    run: RunArgument,
    checkpoint_id: IdOption = None,
    every: Annotated[bool, typer.Option("--all", help="All checkpoints of the run.")] = False,
    debug: DebugOption = False,
) -> None:
    """Read all files of the newest checkpoint, or of others, and compare them with what was written."""
    if every and checkpoint_id is not None:
        leave("error: --id and --all exclude each other", status=2)
    with reported_errors(debug):
        if every:
            folder = _folder(run)
            checkpoints = [folder / entry.id for entry in store.entries(folder)]
        else:
            checkpoints = [_checkpoint(run, checkpoint_id)]
        damaged = 0
        for checkpoint in checkpoints:
            problems = store.problems_of(checkpoint)
            damaged += bool(problems)
            for problem in problems:
                typer.echo(f"{checkpoint.name}: damaged: {problem}")
            if not problems:
                state = store.read_state(checkpoint)
                typer.echo(f"{checkpoint.name}: whole, {len(state['files']) + 1} files, {size(_bytes(state))}")
        if damaged:
            leave(f"error: {damaged} of {len(checkpoints)} damaged in {checkpoints[0].parent}", status=1)


@checkpoints_app.command("prune")
def prune(
    run: RunArgument,
    keep_last: Annotated[int, typer.Option("--keep-last", min=1, metavar="N", help="How many of the newest stay.")],
    keep_every: Annotated[
        int | None, typer.Option("--keep-every", min=1, metavar="N", help="Steps whose multiples stay.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")] = False,
    debug: DebugOption = False,
) -> None:
    """Remove old checkpoints; never the one that `latest` names, the last whole one, or one that cannot be read."""
    with reported_errors(debug):
        folder = _folder(run)
        names = store.surplus(folder, keep_last, keep_every)
        links = [name for name in names if (folder / name).is_symlink()]  # what they point to stays
        freed = sum(_bytes(store.read_state(folder / name)) for name in names if name not in links)
        for name in names:
            if not dry_run:
                with refused(f"cannot remove {folder / name}", "make the folder writable"):
                    store.remove(folder, name)
            typer.echo(f"{'would remove' if dry_run else 'removed'} {'the link ' if name in links else ''}{name}")
        stay = len(store.entries(folder)) - (len(names) if dry_run else 0)
        typer.echo(f"{stay} left, {size(freed)} {'would be freed' if dry_run else 'freed'}")


def _folder(run: Path) -> Path:
    with refused(f"cannot read {run}", "correct its permissions"):
        folder = store.checkpoints_folder(run)
        found = store.entries(folder)
    if not found:
        raise UserError(f"{run} holds no checkpoint; give a run directory or its checkpoints folder")
    return folder


def _checkpoint(run: Path, checkpoint_id: str | None) -> Path:
    with refused(f"cannot read {run}", "correct its permissions"):
        return store.resolve(run, checkpoint_id or store.LATEST, names=("RUN", "--id"))


def _description(checkpoint: Path, state: dict[str, Any]) -> str:
    engine, model = state["engine"], state["model"]
    tensor = engine["tensor_parallel"]
    replicas = engine["world_size"] // tensor
    tokenizer = sorted(name for name in state["files"] if name.startswith("tokenizer/"))
    lines = [
        ("path", str(checkpoint)),
        ("step", f"{state['step']:,}"),
        ("samples", f"{state['samples']:,}" if "samples" in state else ""),
        ("saved", _time(state)),
        ("model", ", ".join(f"{key} {value}" for key, value in model.items() if value is not None)),
        ("precision", engine["precision"]),
        ("ZeRO stage", str(engine["zero_stage"])),
        ("processes", f"{replicas} replica{'s' * (replicas > 1)} x parallel.tensor {tensor}"),
        ("partitions", f"{len(state['partitions'])} parameters divided" if tensor > 1 else ""),
        ("tokenizer", ", ".join(tokenizer)),
        ("size", f"{size(_bytes(state))} in {len(state['files'])} files"),
    ]
    files = [(f"  {name}", size(entry["bytes"])) for name, entry in state["files"].items()]
    return f"{table([(label, text) for label, text in lines if text])}\n{table(files)}"


def _bytes(state: dict[str, Any]) -> int:
    return sum(int(entry["bytes"]) for entry in state["files"].values())


def _time(state: dict[str, Any]) -> str:
    """Return when the checkpoint was saved, in the time of this machine."""
    return datetime.fromisoformat(state["saved_at"]).astimezone().strftime("%Y-%m-%d %H:%M:%S")
