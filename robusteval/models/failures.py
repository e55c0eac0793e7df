"""What breaks in other people's code, as one sentence; and whether memory was what ran out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from robusteval.errors import RobustevalError, RunError, UsageError


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on whichever device."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        sign in text for sign in ("out of memory", "can't allocate memory", "not enough memory")
    )


@contextmanager
def raise_as_run_error(what: str) -> Iterator[None]:
    """Turn whatever breaks in other people's code into a RunError of one sentence.

    Our own errors pass as they are, and so does running out of memory, after which the same work
    can be tried in smaller batches.

    Parameters
    ----------
    what : str
        The start of the sentence, such as "the attack broke".
    """
    try:
        yield
    except RobustevalError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        text = " ".join(str(error).split())[:300]
        raise RunError(f"{what} ({type(error).__name__}: {text})") from error


@contextmanager
def raise_as_usage_error(name: str | None = None) -> Iterator[None]:
    """Turn a ValueError, a parameter out of range, into the UsageError that it is to a user.

    Parameters
    ----------
    name : str, optional
        Whose parameter it is; put before the message, which need not repeat it.
    """
    try:
        yield
    except ValueError as error:
        text = str(error)
        raise UsageError(
            text if name is None else f"{name}: {text.removeprefix(f'{name} ')}"
        ) from None
