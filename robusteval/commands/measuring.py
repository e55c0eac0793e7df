"""The command that a command ends with: how to measure what was made, on images it has not seen."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from robusteval.errors import RobustevalError
from robusteval.runs.types import format_value

if TYPE_CHECKING:
    from robusteval.datasets.dataset import Data


class Unseen(NamedTuple):
    """Images to measure with: other ones than a defense or a network was made with."""

    data: str  # as for --data; a word to be replaced if there are none
    clause: str  # says that there are none, or nothing


def find_unseen(images: Data, data: str, size: int | None) -> Unseen:
    """The images of `data` that `evaluate` takes by itself, if these are others than `images`."""
    if has_other_part(images, data, size):
        return Unseen(data, "")
    return Unseen("IMAGES", f" on images it has not seen ({data} has no other part)")


def has_other_part(images: Data, data: str, size: int | None) -> bool:
    """Whether `evaluate` would by itself take other images of this data than were trained on."""
    from robusteval.datasets.sources import open_data

    try:
        other = open_data(data, channels=images.shape[0], size=size)
    except RobustevalError:
        return False
    return other.source.raw(0) != images.source.raw(0) or len(other) != len(images)


def spell_evaluation(checkpoint: str, options: Iterable[tuple[str, Any]]) -> str:
    """The command that evaluates a checkpoint with these options; those that are None left out."""
    words = ["robusteval", "evaluate", checkpoint]
    for name, value in options:
        if value is not None:
            items = value if isinstance(value, list) else [value]
            words += [f"--{name.replace('_', '-')}", ",".join(map(format_value, items))]
    return shlex.join(words)
