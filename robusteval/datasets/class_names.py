"""Which output of a network a folder of images belongs to, by names instead of positions."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np

from robusteval.datasets.checks import raise_as_unreadable
from robusteval.datasets.dataset import Data
from robusteval.datasets.wordnet import read_wordnet_ids
from robusteval.errors import UsageError
from robusteval.runs.reading import NAMES, check_amount, read_text

MOST_NAMES = 100_000  # ImageNet has 21,841 classes
ADVICE = (
    "name the outputs in order with --classes FILE, one name a line (in Python:"
    " open_data(..., classes=[...]))"
)


def read_class_names(path: Path) -> list[str]:
    """The names in a file: in JSON, or one a line; UsageError if they cannot be read.

    In JSON a list, or an object with the numbers of the outputs as its keys, or as its values like
    `class_to_idx`; a name may stand behind a WordNet id, which then counts, as in
    `{"0": ["n01440764", "tench"], ...}`.
    """
    with raise_as_unreadable(path, "give a text file with one class name a line"):
        text = read_text(path, NAMES, "utf-8-sig")
    if text.lstrip().startswith(("[", "{")):
        with raise_as_unreadable(path, "a JSON list of names is needed"):
            names = _list_values(json.loads(text))
        names = [name[0] if isinstance(name, list) and name else name for name in names]
        if not all(isinstance(name, str) for name in names):
            raise UsageError(
                f"{path} must be a JSON list of names, each of them a text, or an object with the"
                " numbers of the outputs, from 0 without a gap, and their names"
            )
    else:
        names = [line.strip() for line in text.splitlines() if line.strip()]
    check_amount(str(path), len(names), MOST_NAMES, "names")
    return [str(name) for name in names]


def _list_values(read: object) -> list[object]:
    """The elements of a list, or of an object by the numbers that are its keys or its values."""
    if isinstance(read, dict):
        turned = {str(number): name for name, number in read.items() if type(number) is int}
        named = turned if len(turned) == len(read) else read
        return [named.get(str(number)) for number in range(len(read))]
    return read if isinstance(read, list) else [read]


def match_by_names(data: Data, names: Sequence[str], origin: str) -> Data:
    """The same images, each with the position of its folder's name in `names` as its label.

    Case does not count, nor whether words are joined by spaces or underscores. Labels that are
    numbers stay what they are, and get these names.

    Parameters
    ----------
    data : Data
        A folder of class folders, or images whose labels are names or numbers.
    names : sequence of str
        Names of the network's outputs in their order.
    origin : str
        Where the names come from, for the report.

    Raises
    ------
    UsageError
        Two names are the same, or a folder or a number is not among them.
    """
    source: Any = data.source
    if not list_classes(data):
        _place_names(names, origin)
        if data.labels.max() >= len(names):
            raise UsageError(
                f"{data.name} has labels up to {data.labels.max()}, {origin} are {len(names)}: name"
                " every class"
            )
        return name_numbers(data, names)
    places = _place_names(names, origin)
    labels = [_find_place(places, folder) for folder in source.folders]
    for folder, label in zip(source.folders, labels, strict=True):
        if label is None:
            near = difflib.get_close_matches(_simplify(folder), places, n=1)
            hint = f" (did you mean {names[places[near[0]]]!r}?)" if near else ""
            raise UsageError(
                f"the class {folder!r} of {data.name} is not among the {len(names)} names of"
                f" {origin}{hint}: rename it, leave it out, or mend the names"
            )
    # positions in the order of the folders are what labels were until now
    matched = replace(
        source,
        labels=np.array(labels, dtype=np.int64)[source.positions],
        class_names=tuple(names),
        notes=tuple(note for note in source.notes if note not in source.order),
        matching=f"by name, {origin}",
    )
    return replace(data, source=matched)


def name_numbers(data: Data, names: Sequence[str]) -> Data:
    """The same images, whose labels are numbers and get these names."""
    source: Any = data.source
    if not is_dataclass(source) or "class_names" not in {each.name for each in fields(source)}:
        return data  # of another package, which names classes itself or not at all
    named: Any = replace(cast("Any", source), class_names=tuple(names))
    return replace(data, source=named)


def match_classes(data: Data, k: int, names: Sequence[str] | None) -> Data:
    """The images with labels as a network of `k` outputs counts them, where names say how.

    The `names` that the network came with are taken, then those that ImageNet's classes have; data
    that was matched before is left as it is. Labels that are numbers get the network's names where
    the data has none.
    """
    source: Any = data.source
    if not list_classes(data) and not data.class_names and names and len(names) == k:
        return name_numbers(data, names)
    if not list_classes(data) or source.matching:
        return data
    if names and len(names) == k:
        origin = "the network's own list"
        places = _place_names(names, origin)
        if any(_find_place(places, folder) is not None for folder in source.folders):
            return match_by_names(data, names, origin)
    if k == 1000:
        for known, origin in _list_imagenet():
            places = _place_names(known, origin)
            if all(_find_place(places, folder) is not None for folder in source.folders):
                return match_by_names(data, known, origin)
    return _note_other_names(data, names) if names and len(names) == k else data


def _note_other_names(data: Data, names: Sequence[str]) -> Data:
    """The same images with a sentence: their classes are counted, which may be the wrong order."""
    source: Any = data.source
    numbered = all(folder.isdecimal() for folder in source.folders)
    if numbered or len(source.folders) != len(names):
        return data
    note = (
        f"none of the {len(names)} {source.noun} is called as an output of the network, so that"
        f" they are counted in sorted order: {source.folders[0]!r} is taken as {names[0]!r}, and so"
        f" on; if that is wrong, {ADVICE}"
    )
    known = source.notes
    return replace(data, source=replace(source, notes=(*(n for n in known if n != note), note)))


def list_classes(data: Data) -> tuple[str, ...]:
    """Names of class folders, or of labels that are names, in the order that labels count them."""
    return tuple(getattr(data.source, "folders", ()))


def check_folders(data: Data, k: int) -> None:
    """Refuse class folders of which nothing says to which of `k` outputs they belong."""
    source: Any = data.source
    if not list_classes(data):
        return
    if source.matching is None and len(source.folders) != k:
        raise UsageError(
            f"{data.name} has {len(source.folders)} {source.noun}, the network {k} outputs, so"
            f" that labels counted by their order would be wrong: {ADVICE}"
        )
    if source.matching is not None and len(source.class_names or ()) != k:
        raise UsageError(
            f"{len(source.class_names or ())} class names were given for {data.name}, the network"
            f" has {k} outputs: {ADVICE}"
        )


def _place_names(names: Sequence[str], origin: str) -> dict[str, int]:
    """Where each name stands, as it is written and in small letters where that is clear."""
    exact: dict[str, int] = {}
    for place, name in enumerate(names):
        if exact.setdefault(_space(name), place) != place:
            raise UsageError(f"{origin} has the name {name!r} twice")
    # ImageNet has a Cardigan, which is a dog, and a cardigan
    small = Counter(map(_simplify, names))
    loose = {_simplify(n): p for p, n in enumerate(names) if small[_simplify(n)] == 1}
    # of "tench, Tinca tinca" the first name, where no other class begins so
    begins = Counter(name.partition(",")[0] for name in names)
    short = {
        _simplify(n): p
        for n, p in ((n.partition(",")[0], p) for p, n in enumerate(names))
        if begins[n] == 1
    }
    return short | loose | exact


def _find_place(places: Mapping[str, int], folder: str) -> int | None:
    for name in (folder, *list_aliases(folder)):
        place = places.get(_space(name), places.get(_simplify(name)))
        if place is not None:
            return place
    return None


def list_aliases(folder: str) -> list[str]:
    """What torchvision calls the class of a WordNet id; empty for other names."""
    ids = read_wordnet_ids()
    return [_list_torchvision()[ids[folder]]] if folder in ids and _list_torchvision() else []


@cache
def _list_torchvision() -> tuple[str, ...]:
    try:
        from torchvision.models._meta import _IMAGENET_CATEGORIES

        return tuple(_IMAGENET_CATEGORIES)
    except ImportError:
        return ()


def _space(name: str) -> str:
    return " ".join(name.replace("_", " ").split())


def _simplify(name: str) -> str:
    return _space(name).casefold()


def _list_imagenet() -> Iterator[tuple[Sequence[str], str]]:
    """The names of ImageNet's classes in order, and their origin."""
    yield list(read_wordnet_ids()), "WordNet ids"
    if names := _list_torchvision():
        yield names, "torchvision's names of ImageNet's classes"
