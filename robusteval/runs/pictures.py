"""Images of a cell for people to look at, as arrays, and images that may become some."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from robusteval.runs.types import Columns, Picture, Values


def pack_pictures(pictures: Sequence[Picture]) -> Columns:
    """Arrays of pictures of one size; the reverse is `unpack_pictures`."""
    return {
        "place": np.array([picture.place for picture in pictures]),
        "row": np.array([picture.row for picture in pictures]),
        "clean": np.stack([picture.clean for picture in pictures]),
        # half precision is relative: it keeps three digits of any change
        "delta": np.stack([picture.delta for picture in pictures]).astype(np.float16),
        **{
            f"{when}:{name}": np.stack([picture.maps[name][i] for picture in pictures])
            for name in pictures[0].maps
            for i, when in enumerate(("benign", "changed"))
        },
    }


def pair_maps(columns: Columns) -> Iterator[tuple[str, Values, Values]]:
    """Pair the maps ``(m, h', w')`` among the arrays of pictures: interpreter, before, after."""
    for name, values in columns.items():
        when, _, interpreter = name.partition(":")
        if when == "benign":
            yield interpreter, values, columns[f"changed:{interpreter}"]


def unpack_pictures(columns: Columns) -> list[Picture]:
    """Pictures from their arrays; KeyError, TypeError, ValueError or IndexError if it is none."""
    c = columns
    clean, delta = c["clean"], c["delta"]
    if clean.dtype != np.uint8 or clean.ndim != 4 or clean.shape != delta.shape:
        raise ValueError("no images")
    if clean.shape[3] not in (1, 3) or not clean.size or not np.isfinite(delta).all():
        raise ValueError("no images")
    if c["row"].dtype.kind not in "iu" or (c["row"] < 0).any():
        raise ValueError("no rows")
    maps = list(pair_maps(c))
    for _, *views in maps:
        if any(view.dtype.kind != "f" or view.ndim != 3 or not view.size for view in views):
            raise ValueError("no maps")
        if views[0].shape != views[1].shape:
            raise ValueError("maps of several sizes")
    rows = zip(c["place"], c["row"], c["clean"], c["delta"], strict=True)
    return [
        Picture(
            str(place),
            int(row),
            clean,
            delta.astype(np.float32),
            {name: (before[i], after[i]) for name, before, after in maps},
        )
        for i, (place, row, clean, delta) in enumerate(rows)
    ]


def check_pictures(pictures: Sequence[Picture], columns: Columns) -> None:
    """ValueError if pictures are of other rows than the columns have, or of maps they lack."""
    for picture in pictures:
        if picture.row >= len(columns["id"]):
            raise ValueError("of a row that is not there")
        if any(f"map_distance:{name}" not in columns for name in picture.maps):
            raise ValueError("of maps that were not measured")


def check_candidates(columns: Columns) -> None:
    """Whether these are images that may become pictures; KeyError or ValueError if not.

    Of each its row, content id and hardness; the image and what was changed of it; maps as in
    pictures.
    """
    rows, clean = columns["row"], columns["clean"]
    if any(values.shape[:1] != rows.shape for values in columns.values()):
        raise ValueError("of several lengths")
    kinds = {"row": "iu", "id": "u", "hard": "fiu", "clean": "u", "delta": "f"}
    if any(columns[name].dtype.kind not in kind for name, kind in kinds.items()):
        raise ValueError("of other types")
    if clean.ndim != 4 or clean.shape != columns["delta"].shape or columns["hard"].ndim != 1:
        raise ValueError("no images")
    for _, *views in pair_maps(columns):
        if any(view.dtype.kind != "f" or view.ndim != 3 for view in views):
            raise ValueError("no maps")
