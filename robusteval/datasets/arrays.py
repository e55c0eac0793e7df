"""Images and labels in memory as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from robusteval.datasets.checks import (
    Span,
    arrange_nchw,
    check_values,
    convert_to_array,
    number_labels,
    raise_as_unreadable,
    read_range,
)
from robusteval.datasets.class_names import match_by_names
from robusteval.datasets.dataset import ArraySource, Data
from robusteval.errors import NothingEvaluated, UsageError


def from_arrays(
    images: Any,
    labels: Any,
    *,
    name: str = "arrays",
    class_names: Sequence[str] | None = None,
    channels: int | None = None,
    value_range: Sequence[float] | None = None,
) -> Data:
    """Images and labels in memory as data, checked as those of a file are.

    Parameters
    ----------
    images : array_like
        An array, a tensor, or a list of arrays or Pillow images of one shape; ``(n, c, h, w)``,
        ``(n, h, w, c)`` or ``(n, h, w)``; uint8, or floats in [0, 1], or with `value_range`.
    labels : array_like
        ``(n,)`` whole numbers from 0 up, or names.
    name : str
        What reports call it.
    class_names : sequence of str, optional
        What classes are called; labels that are names get their positions among these.
    channels : int, optional
        How many there are, where the shape alone does not tell which axis is theirs.
    value_range : sequence of float, optional
        The values that stand for black and white, such as ``(0, 65535)``.

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
    span = read_range(value_range)
    source = build_array_source(name, images, labels, bands=channels, span=span)
    if source.folders and names is not None:
        data = match_by_names(Data(source, source.shape), names, "the class names given")
        return data
    if names is not None:
        check_names(name, source.labels, names)
        source = replace(source, class_names=names)
    return Data(source, source.shape)


def build_array_source(
    name: str,
    images: np.ndarray,
    labels: np.ndarray,
    class_names: tuple[str, ...] | None = None,
    *,
    bands: int | None = None,
    span: Span | None = None,
) -> ArraySource:
    """Arrays of any known layout as a source; UsageError if they are not images and labels.

    Parameters
    ----------
    name : str
        What to call them.
    images, labels : ndarray
        As for `from_arrays`.
    class_names : tuple of str, optional
        Names of numbered classes.
    bands : int, optional
        Channels that the model takes.
    span : tuple of float, optional
        Values of black and white.
    """
    images = arrange_nchw(name, images, bands)
    if len(images) == 0:
        raise NothingEvaluated(f"{name} holds no images: there is nothing to evaluate")
    check_values(name, images, span)
    numbers, names = number_labels(name, labels, len(images))
    if names is None and class_names is not None:
        check_names(name, numbers, class_names)
    return ArraySource(name, images, numbers, names or class_names, folders=names or (), span=span)


def check_names(name: str, numbers: np.ndarray, class_names: Sequence[str]) -> None:
    """Refuse labels that have no name."""
    if numbers.max() >= len(class_names):
        raise UsageError(
            f"{name} has labels up to {numbers.max()} and {len(class_names)} class names: name"
            " every class"
        )
