"""A run config of two keys, and the command line called in this process."""

from typer.testing import CliRunner

from xformer_train.launcher.commands import app

MINIMAL = "training: {max_steps: 10, train_batch_size: 8}\n"


def invoke(*arguments):
    return CliRunner().invoke(app.app, list(arguments), env={"COLUMNS": "200"})
