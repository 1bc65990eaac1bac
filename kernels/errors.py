"""The type of errors that a person can mend. Importing this module imports no torch."""


class UserError(ValueError):
    """Say what a person must change: one sentence with the field, its value, the rule and the remedy.

    Raise it only where the message is for a person: a run config, a file, a command line, the arguments of a public function.
    The command line prints it as one line. Every other exception is a fault of this project and shows its traceback.
    """
