"""Hints for command lines that are wrong in ways that are easily mended."""

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from ..config.flags import FLAGS

UsageError: Any = typer.BadParameter.__base__  # of click, or of the copy of it that newer typers hold
_FILES = (".yaml", ".yml", ".json")
_OF_TRAINING = {"set", "resume"} | {name.removeprefix("--").replace("_", "-") for flag in FLAGS for name in flag.names}


class Commands(TyperGroup):
    """Commands that say what to write in place of a word that is none of them."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        word = args[0]
        if word not in self.commands and word in ("train", "run", "pretrain"):
            ctx.fail(f"No such command {word!r}: training is the command without a name, xformer-train --config FILE")
        if word not in self.commands and word.endswith(_FILES):
            ctx.fail(f"No such command {word!r}: a run config is given with --config {word}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UsageError as error:
            files = [word for word in error.message.strip(")").replace("(", " ").split() if word.endswith(_FILES)]
            if "unexpected extra argument" in error.message and files:
                error.message += f"; a run config is given with --config {files[0]}"
            raise


class Launch(TyperCommand):
    """The command `launch`, which says where the run config and the options of training stand."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        files = [word for word in args if word.endswith(_FILES)]
        try:
            return super().parse_args(ctx, args)
        except UsageError as error:
            name = getattr(error, "option_name", "").lstrip("-").replace("_", "-")
            if name in _OF_TRAINING:
                error.possibilities = None
                remedy = f"write it after --, as in: launch --config FILE -- --{name} ..."
                error.message = f"--{name} is an option of training; {remedy}"
            elif not error.message and files:
                error.message = f"A run config is given with --config {files[0]}"
            raise
