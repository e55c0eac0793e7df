"""Images and labels in memory as data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from robusteval.datasets.checks import (
    arrange_nchw,
    check_values,
    convert_labels,
)
from robusteval.datasets.dataset import Data
from robusteval.errors import NothingEvaluated


def from_arrays(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    name: str = "arrays",
    class_names: tuple[str, ...] | None = None,
) -> Data:
    """Images and labels in memory as data, checked as those of a file are.

    Parameters
    ----------
    images : ndarray
        ``(n, c, h, w)``, ``(n, h, w, c)`` or ``(n, h, w)``; uint8, or floats in [0, 1].
    labels : ndarray
        ``(n,)`` whole numbers from 0 up.
    name : str
        What reports call it.
    class_names : tuple of str, optional
        What classes are called.

    Raises
    ------
    UsageError
        Shapes, values or labels are not of this form.
    NothingEvaluated
        There are no images.
    """
    source = build_array_source(name, images, labels, class_names)
    c, h, w = source.image(0).shape
    return Data(source, (c, h, w))


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Images in one array, `(n, c, h, w)`: integers from 0 to 255 or floats in [0, 1]."""

    name: str
    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def where(self, index: int) -> str:
        """Name the data set and the position."""
        return f"{self.name}, image {index}"

    def raw(self, index: int) -> bytes:
        """Give the stored values with their type, whatever the layout they were stored in."""
        return self.images.dtype.str.encode() + np.ascontiguousarray(self.images[index]).tobytes()

    def image(self, index: int) -> np.ndarray:
        """Scale one image, `(c, h, w)`, to float32 in [0, 1]."""
        pixels = np.array(self.images[index], dtype=np.float32, order="C")
        return pixels / np.float32(255) if self.images.dtype.kind in "iu" else pixels


def build_array_source(
    name: str, images: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...] | None = None
) -> ArraySource:
    """Arrays of any known layout as a source; UsageError if they are not images and labels."""
    images = arrange_nchw(name, images)
    if len(images) == 0:
        raise NothingEvaluated(f"{name} holds no images: there is nothing to evaluate")
    check_values(name, images)
    return ArraySource(name, images, convert_labels(name, labels, len(images)), class_names)
