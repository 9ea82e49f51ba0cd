"""Errors that a user can mend: one readable line, no traceback, exit code 2.

Everything else that escapes is a fault of the program (exit code 1). `launch/cli.py` maps them to exit codes.
"""


class UserError(Exception):
    """Bad usage, configuration or data. The message names the field, the value and the remedy in one line."""


class ConfigError(UserError):
    """A configuration is wrong: unknown key, wrong type, values that contradict each other."""


class DataError(UserError):
    """Input data is missing, empty or malformed beyond what may be skipped."""


class RunAbortedError(Exception):
    """A run cannot go on; the message says why and what to do in one line: exit code 1, no traceback."""


class SaveError(RunAbortedError):
    """A checkpoint could not be written; those before it are as they were."""


class StopRequestedError(Exception):
    """The run was asked to stop and has saved a checkpoint: exit code 75, resume to go on."""
