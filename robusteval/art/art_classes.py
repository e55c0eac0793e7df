"""Classes of ART made of attack functions when they are asked for: importing ART takes seconds."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor

NAMES = "__art_classes__"  # what a module is asked for by those who want to know all of its classes


def make_art_class(name: str, **functions: Callable[..., Tensor]) -> Any:
    """Make an ART attack of a function, for ``__getattr__`` of the module that defines both.

    Parameters
    ----------
    name : str
        What the module was asked for: a class, or ``__art_classes__`` for the names of all.
    **functions
        The attack function of each class, by the name of the class.

    Returns
    -------
    type of ArtAttack or tuple of str
        The class, the same one every time; or the names.

    Raises
    ------
    AttributeError
        If there is no such class.
    """
    if name == NAMES:
        return tuple(functions)
    if name not in functions:
        module = next(iter(functions.values())).__module__
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    from robusteval.art.to_art import ArtAttack

    function = functions[name]
    content = {
        "__doc__": f"`{function.__name__}` as an ART evasion attack.",
        "__module__": function.__module__,
        "perturb": staticmethod(function),
    }
    found = types.new_class(name, (ArtAttack,), exec_body=lambda body: body.update(content))
    # as if it had been written there: of two threads that ask at once, both get the first
    return vars(sys.modules[function.__module__]).setdefault(name, found)
