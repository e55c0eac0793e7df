"""A pair of NumPy files, one with images and one with labels."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from robusteval.datasets.arrays import build_array_source
from robusteval.datasets.checks import Span, raise_as_unreadable
from robusteval.datasets.dataset import ArraySource
from robusteval.datasets.npz import map_array
from robusteval.errors import UsageError
from robusteval.registry import DATA_SOURCES
from robusteval.runs.archives import read_file_layout
from robusteval.runs.reading import ARRAYS, open_regular

# what files of images are called, and what those of their labels
NAMES = {
    "images": ("labels", "targets"),
    "image": ("label", "labels"),
    "imgs": ("labels",),
    "inputs": ("targets", "labels"),
    "data": ("labels", "targets", "label"),
    "features": ("labels", "targets"),
    "x": ("y", "labels"),
    "X": ("y", "Y", "labels"),
}


@DATA_SOURCES.add("npy", suffix=".npy", written="x.npy")
def open_npy(path: Path, bands: int | None = None, span: Span | None = None) -> ArraySource:
    """images, with labels beside them in y.npy (or images.npy and labels.npy, and so on)."""
    partners = list(dict.fromkeys(_list_partners(path)))
    found = next((p for p in partners if os.path.isfile(p)), None)
    if found is None:
        listed = ", ".join(partner.name for partner in partners[:4]) or "a name with x or images"
        raise UsageError(
            f"{path} holds images alone: put their labels beside it, as {listed} (x.npy belongs to"
            " y.npy, images.npy to labels.npy)"
        )
    images, labels = _read(path), _read(found)
    return build_array_source(path.name, images, labels, bands=bands, span=span)


def _list_partners(path: Path) -> Iterator[Path]:
    """Where the labels of a file of images may be."""
    for word, others in NAMES.items():
        pattern = re.compile(rf"(?<![A-Za-z]){word}(?![A-Za-z])")
        if pattern.search(path.stem):
            for other in others:
                yield path.with_name(pattern.sub(other, path.stem) + path.suffix)


def _read(path: Path) -> np.ndarray:
    """An array that stays in its file until it is looked at."""
    with (
        raise_as_unreadable(path, "write it again with numpy.save, plain numbers only"),
        open_regular(path, ARRAYS) as file,
    ):
        return map_array(file, read_file_layout(file, path.name))
