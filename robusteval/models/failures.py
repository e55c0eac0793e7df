"""What breaks in other people's code, as one sentence; and whether memory was what ran out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from robusteval.errors import RobustevalError, RunError


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on whichever device."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        sign in text for sign in ("out of memory", "can't allocate memory", "not enough memory")
    )


@contextmanager
def sentence(what: str) -> Iterator[None]:
    """Turn whatever breaks in other people's code into one sentence."""
    try:
        yield
    except RobustevalError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        text = " ".join(str(error).split())[:300]
        raise RunError(f"{what} ({type(error).__name__}: {text})") from error
