"""Whether arrays are images and labels, and how what cannot be read is said."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from robusteval.errors import RobustevalError, UsageError

CHUNK = 16 * 2**20  # bytes looked at or copied at a time
MOST_DIGITS = 18  # of a label that is written as text; int64 holds them all


Span = tuple[float, float]  # values that stand for black and white


def arrange_nchw(name: str, images: np.ndarray, channels: int | None = None) -> np.ndarray:
    """View images of any known layout as ``(n, c, h, w)``; UsageError if it cannot be told.

    The axis of the channels is the one as long as the model takes, else the one of length 1 or 3,
    else, of square images, the one that is not a side.
    """
    shape = images.shape
    if images.ndim == 3 and min(shape[1:]) > 0:
        return images[:, None]
    if images.ndim == 4 and min(shape[1:]) > 0:
        first, last = ({1, 3, channels} & {side} != set() for side in (shape[1], shape[3]))
        if (shape[1] == channels) != (shape[3] == channels):
            first, last = shape[1] == channels, shape[3] == channels
        if first and last:
            raise UsageError(
                f"{name} has the shape {shape}, which can be read as NCHW and as NHWC: "
                "drop the axis that is not the channels (x.squeeze), or make the images larger"
            )
        if not first and not last:
            first = shape[2] == shape[3] != shape[1]
            last = shape[1] == shape[2] != shape[3]
        if first:
            return images
        if last:
            return images.transpose(0, 3, 1, 2)
    raise UsageError(
        f"{name} has the shape {shape}: reshape it to (n, h, w), (n, h, w, c) or (n, c, h, w), "
        "where c is as many channels as the model takes"
    )


def check_values(
    name: str, images: np.ndarray, span: Span | None = None, *, part: bool = False
) -> None:
    """Refuse images ``(n, ...)`` that are not integers from 0 to 255 or floats in [0, 1].

    Where a span is given they must lie in it. Of a part of the images there may be nothing but
    black, of all there may not.
    """
    if images.dtype.kind not in "iuf":
        raise UsageError(
            f"{name} holds {images.dtype}: convert it to uint8, or to floats in [0, 1]"
        )
    rows = max(1, CHUNK // images[0].nbytes)
    lows, highs = [], []
    for start in range(0, len(images), rows):
        some = images[start : start + rows]
        lows.append(some.min())
        highs.append(some.max())
        give_back_pages(images)
    low, high = float(np.min(lows)), float(np.max(highs))
    if span is not None:
        check_width(name, images.dtype, span)
        check_span(name, low, high, span)
    elif images.dtype.kind in "iu":
        _check_integers(name, low, high, part)
    else:
        _check_floats(name, low, high, part)


def give_back_pages(images: object) -> None:
    """Let the system have the memory of a mapped array back; what is read again comes again.

    Without it all of a file that was looked at once counts as memory of this process.
    """
    mapped = getattr(images, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def check_span(name: str, low: float, high: float, span: Span) -> None:
    """Refuse values from `low` to `high` that are not all in a span."""
    if not span[0] <= low <= high <= span[1]:
        raise UsageError(
            f"{name} holds values from {spell_value(low)} to {spell_value(high)}, outside --range"
            f" {spell_value(span[0])},{spell_value(span[1])}: give the range that the model was"
            " trained for, and cut off or leave out what is not in it"
        )


def check_width(name: str, kind: np.dtype[Any], span: Span) -> None:
    """Refuse values of 8 bits where the white of a span is above all of them."""
    if kind == np.uint8 and span[1] > 255:
        raise UsageError(
            f"{name} has 8 bits, of which none reaches the white of --range"
            f" {spell_value(span[0])},{spell_value(span[1])}: give the range of its values (colour"
            " files of 16 bits are read as 8: save those as arrays in FILE.npz)"
        )


def spell_value(value: float) -> str:
    """A pixel value with the digits that tell it from others, a whole one without a point."""
    whole = float(value).is_integer() and abs(value) < 1e16
    return f"{value:.0f}" if whole else f"{value:.9g}"


def read_range(values: Sequence[float] | None) -> Span | None:
    """Two numbers, the first below the second; UsageError if they are not."""
    if values is None:
        return None
    numbers = [float(value) for value in values]
    if len(numbers) != 2 or not np.isfinite(numbers).all() or numbers[0] >= numbers[1]:
        raise UsageError("--range takes two numbers, the values of black and of white: 0,65535")
    return numbers[0], numbers[1]


def scale_to_span(values: np.ndarray, span: Span) -> np.ndarray:
    """Values as float32 in [0, 1], from black to white."""
    low, high = span
    scaled: np.ndarray = (values.astype(np.float64) - low) / (high - low)
    return scaled.astype(np.float32)


def _check_integers(name: str, low: float, high: float, part: bool) -> None:
    if low < 0 or high > 255:
        raise UsageError(
            f"{name} holds integers from {spell_value(low)} to {spell_value(high)}, not 0 to 255:"
            " convert it to uint8, or say with --range LOW,HIGH what is black and white"
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
        raise UsageError(
            f"{name} holds floats up to {spell_value(high)}: scale them to [0, 1], or say with"
            " --range LOW,HIGH what is black and white"
        )
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


def number_labels(
    name: str, labels: np.ndarray, n: int
) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """Labels of `n` images as ``(n,)`` int64, and their names in order where they are texts."""
    if labels.dtype.kind == "S":
        with raise_as_unreadable(f"the labels of {name}", "save names as text in UTF-8"):
            labels = np.char.decode(labels, "utf-8")
    if labels.dtype.kind != "U" or labels.shape not in ((n,), (n, 1)):
        return convert_labels(name, labels, n), None
    texts = np.char.strip(labels.ravel())
    if all(text.isdecimal() and text.isascii() for text in texts.tolist()):
        if max(map(len, texts.tolist()), default=0) > MOST_DIGITS:
            raise UsageError(f"{name} has labels of more than {MOST_DIGITS} digits: mend them")
        return convert_labels(name, texts.astype(np.int64), n), None
    names, numbers = np.unique(texts, return_inverse=True)
    if "" in names:
        raise UsageError(f"{name} has images without a label: name the class of each")
    return numbers.astype(np.int64), tuple(map(str, names))


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
