"""Images and labels in memory as data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from robusteval.datasets.checks import (
    arrange_nchw,
    check_values,
    convert_labels,
    convert_to_array,
    raise_as_unreadable,
)
from robusteval.datasets.dataset import ArraySource, Data
from robusteval.errors import NothingEvaluated, UsageError


def from_arrays(
    images: Any,
    labels: Any,
    *,
    name: str = "arrays",
    class_names: Sequence[str] | None = None,
) -> Data:
    """Images and labels in memory as data, checked as those of a file are.

    Parameters
    ----------
    images : array_like
        An array, a tensor, or a list of arrays or Pillow images of one shape; ``(n, c, h, w)``,
        ``(n, h, w, c)`` or ``(n, h, w)``; uint8, or floats in [0, 1].
    labels : array_like
        ``(n,)`` whole numbers from 0 up.
    name : str
        What reports call it.
    class_names : sequence of str, optional
        What classes are called.

    Raises
    ------
    UsageError
        Shapes, values or labels are not of this form.
    NothingEvaluated
        There are no images.
    """
    with raise_as_unreadable(name, "give images of one shape, and a number for each as its label"):
        images, labels = convert_to_array(images), convert_to_array(labels)
    names = None if class_names is None else tuple(class_names)
    source = build_array_source(name, images, labels, names)
    c, h, w = source.image(0).shape
    return Data(source, (c, h, w))


def build_array_source(
    name: str, images: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...] | None = None
) -> ArraySource:
    """Arrays of any known layout as a source; UsageError if they are not images and labels."""
    images = arrange_nchw(name, images)
    if len(images) == 0:
        raise NothingEvaluated(f"{name} holds no images: there is nothing to evaluate")
    check_values(name, images)
    numbers = convert_labels(name, labels, len(images))
    if class_names is not None and numbers.max() >= len(class_names):
        raise UsageError(
            f"{name} has labels up to {numbers.max()} and {len(class_names)} class names: name"
            " every class"
        )
    return ArraySource(name, images, numbers, class_names)
