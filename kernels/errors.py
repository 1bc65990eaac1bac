"""The types of errors that a person can mend. Importing this module imports no torch."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Say what a person must change: one sentence with the field, its value, the rule and the remedy.

    Raise it only where the message is for a person: a run config, a file, a command line, the arguments of a public function.
    The command line prints it as one line. Every other exception is a fault of this project and shows its traceback.
    """


class RefusedError(UserError, OSError):
    """Say what the operating system or another process refused, and what a person can do about it."""


@contextmanager
def refused(what: str, remedy: str) -> Iterator[None]:
    """Raise RefusedError `what: reason; remedy` for what the operating system refuses inside.

    what: names the path, as in "cannot write runs/a/env.json".
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise RefusedError(f"{what}: {error.strerror or error}; {remedy}") from error
