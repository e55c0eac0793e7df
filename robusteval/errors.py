"""What can go wrong in a way a user can mend, and the exit code that goes with it."""


class RobustevalError(Exception):
    """A foreseeable mistake or failure; the message is one sentence that says what to do."""

    exit_code = 3


class UsageError(RobustevalError):
    """Bad input or options: nothing was evaluated and nothing was written."""

    exit_code = 2


class RunError(RobustevalError):
    """Something broke while running; what was finished before is saved."""

    exit_code = 3


class Refused(RobustevalError):
    """A checkpoint that could run code: it was not opened and nothing in it was executed."""

    exit_code = 4


class NothingEvaluated(RobustevalError):
    """No image was left to judge, so there is no number to print."""

    exit_code = 5


class Interrupted(RobustevalError):
    """Stopped by the user; the finished part is saved and the same command continues."""

    exit_code = 130
