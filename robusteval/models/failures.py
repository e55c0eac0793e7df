"""What breaks in other people's code, as one sentence; and what to do when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from robusteval.errors import RobustevalError, RunError, UsageError
from robusteval.models.steps import part
from robusteval.models.user_code import describe_exception

Rows = TypeVar("Rows", Tensor, np.ndarray[Any, Any])
Result = TypeVar("Result")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on whichever device."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        sign in text for sign in ("out of memory", "can't allocate memory", "not enough memory")
    )


def run_in_parts(
    work: Callable[[Rows], Result],
    rows: Rows,
    size: int | None = None,
    *,
    least: int = 1,
    shrink: Callable[[int], object] = lambda size: None,
) -> list[tuple[Rows, Result]]:
    """Do the work on some rows part by part, in smaller parts once memory runs out.

    Parameters
    ----------
    work : callable
        ``rows of a part -> result``. Called once with no rows if there are none.
    rows : Tensor or ndarray
        Rows ``(m,)``.
    size : int, optional
        Rows of a part to begin with, all of them if not given. A part that does not fit is halved,
        and none after it is larger.
    least : int
        Rows below which nothing is gained: a part of as many is not halved.
    shrink : callable
        Told the new size of parts before one is tried.

    Returns
    -------
    list of (rows, result)
        Of each part, in the order of the rows.

    Raises
    ------
    Exception
        As the work raised it, where memory is not the reason or does not suffice for `least` rows.
    """
    size = max(least, len(rows)) if size is None else size
    done: list[tuple[Rows, Result]] = []
    start = 0
    while start < len(rows) or not done:
        some = rows[start : start + size]
        try:
            with part(start, start + len(some), len(rows)):
                done.append((some, work(some)))
            start += len(some)
            continue
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if len(some) <= least or not is_out_of_memory(error):
                raise
        # not inside the handler, which holds on to the memory of what broke
        size = max(least, len(some) // 2)
        shrink(size)
    return done


# what attacks a model that gives no gradient, with what it needs
WITHOUT_GRADIENT = "noise, art:SquareAttack or art:HopSkipJump"


def explain_no_gradient(model: Callable[[Tensor], Tensor], x: Tensor) -> str | None:
    """Why a model gives no gradient at images ``(n, c, h, w)``, and what attacks it all the same.

    NumPy inside, a detached graph and quantised layers are reasons; None if it gives one. Running
    out of memory says nothing and passes as it is.
    """
    z = x.detach().clone().requires_grad_()
    try:
        with torch.enable_grad():
            value = model(z).sum()
            if (
                value.requires_grad
                and torch.autograd.grad(value, z, allow_unused=True)[0] is not None
            ):
                return None
        reason = "its logits do not hang on the images by operations of torch"
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return (
        f"the model gives no gradient ({reason}): use attacks that need none, such as"
        f" {WITHOUT_GRADIENT}"
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
        raise RunError(f"{what} ({describe_exception(error)})") from error


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
