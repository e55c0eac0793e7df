"""Which class an attack is to reach, where its user chose it: one for all images, or one each."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from robusteval.datasets.checks import raise_as_unreadable
from robusteval.datasets.dataset import Positions
from robusteval.errors import UsageError
from robusteval.runs.reading import NAMES, read_text
from robusteval.runs.storage import digest
from robusteval.runs.types import Spec, Threat

ADVICE = "give a class by its name or number, or a text file with one class a line"


class Goals(NamedTuple):
    """Chosen classes.

    Attributes
    ----------
    classes : ndarray
        Of all images alike ``(1,)``, or of each image of the data set in its order ``(total,)``.
    identity : int or str
        What decides results: the class, or ``sha256:…`` of the classes of a file.
    """

    classes: Positions
    identity: int | str

    def pick(self, index: Positions | None, n: int) -> Tensor:
        """The classes of `n` images at some positions ``(n,)`` of the data set.

        UsageError if these are not known and every image has its own.
        """
        if len(self.classes) == 1:
            return torch.full((n,), int(self.classes[0]), dtype=torch.int64)
        if index is None:
            raise UsageError("here a target must be one class for all images, not a file")
        return torch.from_numpy(self.classes[index])


def read_goals(text: str, k: int, names: Sequence[str] | None, total: int | None) -> Goals:
    """The classes that ``target=`` chooses.

    Parameters
    ----------
    text : str
        Name or number of a class, or a file with one of these in each line: those of the images of
        the data set, in its order. A name goes before a number, a number before a file.
    k : int
        Classes of the network.
    names : sequence of str or None
        Theirs, in order.
    total : int or None
        Images in the data set; None if there is none, so that no file can be read.

    Raises
    ------
    UsageError
        It is none of these, a line is no class, or there are not as many lines as images.
    """
    places = place_names(names or ())
    found = find_class(text, k, places)
    if found is not None:
        return Goals(np.array([found]), found)
    path = Path(text)
    if not path.suffix and "/" not in text and not path.is_file():
        raise UsageError(f"target={text} is no class{explain_classes(text, k, places)}: {ADVICE}")
    with raise_as_unreadable(path, ADVICE):
        lines = [line.strip() for line in read_text(path, NAMES, "utf-8-sig").rstrip().split("\n")]
    if total is None:
        raise UsageError("here a target must be one class for all images, not a file")
    if len(lines) != total:
        raise UsageError(
            f"{path} has {len(lines)} lines, the data {total} images: give one class a line for"
            " every image of --data in its order, also for those that --samples leaves out"
        )
    classes = np.empty(total, dtype=np.int64)
    for i, line in enumerate(lines):
        place = find_class(line, k, places)
        if place is None:
            raise UsageError(
                f"line {i + 1} of {path}, {line!r}, is no class{explain_classes(line, k, places)}"
            )
        classes[i] = place
    return Goals(classes, f"sha256:{digest(classes.tolist())}")


def place_names(names: Sequence[str]) -> dict[str, int]:
    """Where each name stands; of ``tench, Tinca tinca`` also the part before the comma."""
    short = Counter(name.partition(",")[0] for name in names)
    both = [(name.partition(",")[0], place) for place, name in enumerate(names)]
    clear = {name: place for name, place in both if short[name] == 1}
    count = Counter(names)
    return clear | {name: place for place, name in enumerate(names) if count[name] == 1}


def find_class(text: str, k: int, places: dict[str, int]) -> int | None:
    """The class of this name or number; None if there is none."""
    if text in places:
        return places[text]
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else k
    return number if number < k else None


def explain_classes(text: str, k: int, places: dict[str, int]) -> str:
    """Which names come near to one that is none, or what numbers there are."""
    small = {name.casefold(): name for name in places}
    near = difflib.get_close_matches(text.casefold(), small, n=3)
    if near:
        return f" (did you mean {' or '.join(repr(small[name]) for name in near)}?)"
    return f": they are numbered from 0 to {k - 1}" + (" and have names" if places else "")


def spell_goal(threat: Threat, specs: Iterable[Spec]) -> dict[str, Any]:
    """The parameters that give another attack the goal of attacks `specs` under a threat.

    The class that their user chose, if it was the same for all.
    """
    if not threat.targeted:
        return {}
    chosen = {spec.parameters.get("target") for spec in specs}
    target = chosen.pop() if len(chosen) == 1 else None
    return {"targeted": True} if target is None else {"target": target}
