"""Whether arrays are images and labels, and how what cannot be read is said."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from robusteval.errors import RobustevalError, UsageError

CHUNK = 16 * 2**20  # bytes looked at or copied at a time


def arrange_nchw(name: str, images: np.ndarray) -> np.ndarray:
    """View images of any known layout as ``(n, c, h, w)``; UsageError if it cannot be told."""
    shape = images.shape
    if images.ndim == 3 and min(shape[1:]) > 0:
        return images[:, None]
    if images.ndim == 4 and min(shape[1:]) > 0:
        first, last = shape[1] in (1, 3), shape[3] in (1, 3)
        if first and last:
            raise UsageError(
                f"{name} has the shape {shape}, which can be read as NCHW and as NHWC: "
                "drop the axis that is not the channels (x.squeeze), or make the images larger"
            )
        if first:
            return images
        if last:
            return images.transpose(0, 3, 1, 2)
    raise UsageError(
        f"{name} has the shape {shape}: reshape it to (n, h, w), (n, h, w, c) or (n, c, h, w), "
        "where c is 1 or 3"
    )


def check_values(name: str, images: np.ndarray, *, part: bool = False) -> None:
    """Refuse images ``(n, ...)`` that are not integers from 0 to 255 or floats in [0, 1].

    Of a part of the images there may be nothing but black, of all there may not.
    """
    if images.dtype.kind not in "iuf":
        raise UsageError(
            f"{name} holds {images.dtype}: convert it to uint8, or to floats in [0, 1]"
        )
    rows = max(1, CHUNK // images[0].nbytes)
    parts = [images[start : start + rows] for start in range(0, len(images), rows)]
    low = float(np.min([part.min() for part in parts]))
    high = float(np.max([part.max() for part in parts]))
    if images.dtype.kind in "iu":
        _check_integers(name, low, high, part)
    else:
        _check_floats(name, low, high, part)


def _check_integers(name: str, low: float, high: float, part: bool) -> None:
    if low < 0 or high > 255:
        raise UsageError(
            f"{name} holds integers from {low:g} to {high:g}, not 0 to 255: convert it to uint8"
        )
    if high <= 1 and not part:
        raise UsageError(
            f"{name} holds integers no larger than {high:g}, which is black: "
            "if 1 means white, convert it to floats"
        )


def _check_floats(name: str, low: float, high: float, part: bool) -> None:
    if not np.isfinite([low, high]).all():
        raise UsageError(f"{name} holds NaN or infinite values: remove those images")
    if low < 0:
        raise UsageError(
            f"{name} looks normalised (min {low:g}, max {high:g}): give raw pixels in [0, 1] and "
            "pass mean and deviation to the model with --mean and --std"
        )
    if high > 255:
        raise UsageError(f"{name} holds floats up to {high:g}: scale them to [0, 1]")
    if high > 2:
        raise UsageError(
            f"{name} looks like 0..255 stored as float (max {high:g}): "
            "convert to uint8 or divide by 255"
        )
    if high > 1:
        raise UsageError(f"{name} holds floats up to {high:.9g}: clip them to [0, 1]")
    if high < 1.5 / 255 and not part:
        raise UsageError(
            f"{name} holds nothing brighter than {high:g}, which is black: "
            "was it divided by 255 twice?"
        )


def convert_labels(name: str, labels: np.ndarray, n: int) -> np.ndarray:
    """Labels of `n` images, one number each or one-hot, as ``(n,)`` int64; UsageError otherwise."""
    if labels.shape[:1] != (n,):
        raise UsageError(f"{name} has {n} images but labels of shape {labels.shape}: give one each")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim > 2 or labels.dtype.kind not in "biuf":
        raise UsageError(
            f"{name} has labels of shape {labels.shape} and type {labels.dtype}: "
            "give one integer per image"
        )
    if labels.ndim == 2:
        if not (np.isin(labels, (0, 1)).all() and (labels.sum(axis=1) == 1).all()):
            raise UsageError(f"{name} has labels that are not one-hot: give one integer per image")
        return np.nonzero(labels)[1]
    with np.errstate(invalid="ignore"):  # NaN turns into some integer, and so differs below
        indices = labels.astype(np.int64)
    if not np.array_equal(indices, labels) or indices.min() < 0:
        raise UsageError(f"{name} has labels that are not whole numbers from 0 up: mend them")
    return indices


def convert_to_array(value: Any) -> np.ndarray:
    """A tensor, array, list or number as an array on the processor."""
    detach: Any = getattr(value, "detach", None)
    if detach is not None:
        value = detach().cpu()
    array: np.ndarray = np.asarray(value)
    return array


@contextmanager
def raise_as_unreadable(path: Path | str, advice: str) -> Iterator[None]:
    """Turn what a decoder raises on a damaged file into a sentence that names the file."""
    try:
        yield
    except RobustevalError:
        raise
    except Exception as error:  # damaged bytes make decoders raise nearly anything
        raise UsageError(f"{path} cannot be read ({explain_cause(error)}): {advice}") from error


def explain_cause(error: Exception) -> str:
    """The message of an exception on one line, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
