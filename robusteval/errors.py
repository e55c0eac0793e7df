"""What can go wrong in a way a user can mend, and the exit code that goes with it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

# options of the command line, and what they are called in Python where that is something else
PYTHON_NAMES = {
    **{
        f"--{name}": name.replace("-", "_")
        for name in (
            *("arch", "mean", "std", "num-classes", "weights", "device", "size", "resize"),
            *(
                "interpolation",
                "classes",
                "split",
                "download",
                "samples",
                "seed",
                "out",
                "fresh",
                "batch-size",
            ),
        )
    },
    "--attack": "attacks",
    "--defense": "defenses",
    "--interpreter": "interpreters",
    "--data": "data",
    "--range": "value_range",
}
_commands = 0  # of the command line that are running; none: a caller in Python reads the errors


@contextmanager
def speak_of_options() -> Iterator[None]:
    """Inside, readers of errors know the options of the command line, and Python names nothing."""
    global _commands
    _commands += 1
    try:
        yield
    finally:
        _commands -= 1


def name_in_python(message: str) -> str:
    """The message, for a caller in Python with the arguments that its options stand for."""
    if _commands or "in Python" in message or "from Python" in message:
        return message
    options = re.findall(r"(?<![\w-])--[a-z]+(?:-[a-z]+)*", message)
    known = [PYTHON_NAMES[name] for name in dict.fromkeys(options) if name in PYTHON_NAMES]
    return f"{message} (in Python: {', '.join(known)})" if known else message


class RobustevalError(Exception):
    """A foreseeable mistake or failure; the message is one sentence that says what to do.

    Parameters
    ----------
    message : str
        The sentence. It may hold names from outside, with line breaks in them: whoever prints it
        prints one line.
    lines : iterable of str
        What stands below the sentence, a line each.
    details : iterable of str
        What a user reads who asks for more (`-v` on the command line), a line each.
    """

    exit_code = 3

    def __init__(
        self, message: str = "", lines: Iterable[str] = (), *, details: Iterable[str] = ()
    ) -> None:
        message = name_in_python(message)
        super().__init__(message)
        self.message = message
        self.lines = tuple(lines)
        self.details = tuple(details)

    def __str__(self) -> str:
        return "\n".join((self.message, *self.lines))


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


class NotToBeUsed(RobustevalError):
    """The model is probably not fed as it was trained: the numbers printed say nothing of it."""

    exit_code = 6


class Interrupted(RobustevalError):
    """Stopped by the user; the finished part is saved and the same command continues."""

    exit_code = 130


@contextmanager
def raise_as_missing(name: str) -> Iterator[None]:
    """Turn the import of a package that is not installed into a UsageError that names it.

    A module of robusteval itself that is missing is a fault of ours and passes as it is.

    Parameters
    ----------
    name : str
        What needs the package, put before the message.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "robusteval"):
            raise
        raise UsageError(
            f"{name} needs the package {package}, which is not installed: install it"
        ) from error


def check_argument(name: str, value: object, kinds: type | tuple[type, ...], advice: str) -> None:
    """Refuse an argument that is something else than expected.

    Parameters
    ----------
    name : str
        What the argument is called.
    value : object
        What was given.
    kinds : type or tuple of type
        What it may be.
    advice : str
        What to give, as the end of the sentence.

    Raises
    ------
    UsageError
        It is nothing of this kind.
    """
    if not isinstance(value, kinds):
        given = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        raise UsageError(f"{name} cannot be {given}: {advice}")


def check_whole(name: str, value: Any, least: int, unit: str = "") -> None:
    """Refuse a number, or what is none, that is not whole and at least `least`; UsageError."""
    if not hasattr(value, "__index__"):
        raise UsageError(f"{name} must be a whole number, not {value!r}")
    if value < least:
        raise UsageError(f"{name} must be at least {least}{unit and f' {unit}'}, not {value}")


def check_path(name: str, value: object) -> None:
    """Refuse what is no path; UsageError."""
    check_argument(name, value, (str, os.PathLike), "give its path")


def check_image_form(x: Any) -> None:
    """Refuse what are no images ``(n, c, h, w)``, as data in tables; ValueError."""
    shape = getattr(x, "shape", None)
    if shape is not None and len(shape) != 4:
        raise ValueError(
            f"x must be images (n, c, h, w), not of shape {tuple(shape)}: other data have no pixels"
            " to count and no neighbours"
        )


def explain_words(name: str, words: tuple[Any, ...], value: Any) -> str:
    """A sentence for a value that is none of some words."""
    shown = ", ".join(str(word).lower() if word is None else str(word) for word in words)
    return f"{name} must be one of {shown}, not {value!r}"
