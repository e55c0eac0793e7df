"""Batches of labelled images with stable ids, whatever they come from."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from robusteval.datasets.checks import give_back_pages, scale_to_span, spell_value
from robusteval.datasets.images import RESAMPLING, Fit, resize_image
from robusteval.errors import NothingEvaluated, UsageError, check_whole

if TYPE_CHECKING:
    from torch import Tensor

# images of a mapped file between two times that their memory is given back: each may be mapped with
# the two megabytes around it
READ_AT_ONCE = 16

Positions = np.ndarray[Any, np.dtype[np.int64]]


class Batch(NamedTuple):
    """Images of one data set, in the order they were asked for.

    Attributes
    ----------
    x : Tensor
        Images, `(n, c, h, w)`, float32 in [0, 1], contiguous.
    y : Tensor
        Labels, `(n,)`, int64.
    ids : ndarray
        What `image_id` says of each image, `(n,)`, uint64.
    index : ndarray
        Positions in the data set, `(n,)`, int64.
    """

    x: Tensor
    y: Tensor
    ids: np.ndarray
    index: np.ndarray  # type: ignore[assignment]  # hides the method that every tuple has


class Source(Protocol):
    """What a kind of data must offer.

    One whose images can be read by several threads at once says so by `in_threads = True`.

    Attributes
    ----------
    name : str
        What to call the data set.
    class_names : tuple of str or None
        Names in label order, where the data set has them.
    labels : ndarray
        `(n,)`, int64, known without decoding an image.
    notes : tuple of str
        Sentences about the data set that its user should read.
    """

    @property
    def name(self) -> str: ...
    @property
    def class_names(self) -> tuple[str, ...] | None: ...
    @property
    def labels(self) -> np.ndarray: ...
    @property
    def notes(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def where(self, index: int) -> str:
        """Give what to call one image in a message."""
        ...

    def raw(self, index: int) -> bytes:
        """Give the bytes that stand for one image in a fingerprint, undecoded."""
        ...

    def image(self, index: int) -> np.ndarray:
        """Give one image, `(c, h, w)`, float32 in [0, 1]."""
        ...


class Images(Protocol):
    """Images of one kind by position, an array or something that reads them when asked."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Images as arrays `(c, h, w)`: integers from 0 to 255, floats in [0, 1], or in a `span`.

    `folders` are the names of classes in the order that labels count them, where labels were given
    by name, and `matching` says how other names decided on the labels instead, where they did.
    """

    name: str
    images: Images
    labels: np.ndarray
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    matching: str | None = None
    span: tuple[float, float] | None = None
    noun = "classes"  # what `folders` are

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the first image, `(c, h, w)`."""
        c, h, w = self.images[0].shape
        return c, h, w

    @property
    def positions(self) -> np.ndarray:
        """Of each image the position of its class in `folders`, `(n,)`, int64."""
        return self.labels

    @property
    def in_threads(self) -> bool:
        """Whether several threads may read images at once."""
        return bool(getattr(self.images, "in_threads", False))

    def __len__(self) -> int:
        return len(self.images)

    def where(self, index: int) -> str:
        """Name the data set and the position."""
        return f"{self.name}, image {index}"

    def let_go(self) -> None:
        """Give back the memory of what was looked at of images that lie in a file."""
        give_back_pages(self.images)

    def raw(self, index: int) -> bytes:
        """Give the stored values with their type, whatever the layout they were stored in."""
        stored = self.images[index]
        return stored.dtype.str.encode() + np.ascontiguousarray(stored).tobytes()

    def image(self, index: int) -> np.ndarray:
        """Scale one image, `(c, h, w)`, to float32 in [0, 1]."""
        stored = self.images[index]
        if self.span is not None:
            return scale_to_span(np.ascontiguousarray(stored), self.span)
        pixels = np.array(stored, dtype=np.float32, order="C")
        return pixels / np.float32(255) if stored.dtype.kind in "iu" else pixels


@dataclass(frozen=True, eq=False)
class Data:
    """A source and how its images are brought to one shape.

    Attributes
    ----------
    source : Source
        Where the images come from.
    shape : tuple of int
        `(c, h, w)` of every image in a batch.
    fit : Fit or None
        How every image is brought to that shape; None leaves images as stored.
    """

    source: Source
    shape: tuple[int, int, int]
    fit: Fit | None = None

    def __len__(self) -> int:
        return len(self.source)

    @property
    def name(self) -> str:
        """What to call the data set."""
        return self.source.name

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names in label order, where the data set has them."""
        return self.source.class_names

    @property
    def labels(self) -> np.ndarray:
        """`(n,)`, int64."""
        return self.source.labels

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about the data set that its user should read."""
        return self.source.notes

    @property
    def matching(self) -> str | None:
        """How names decided on the labels, in words; None where they are numbers or positions."""
        matching: str | None = getattr(self.source, "matching", None)
        return matching

    @property
    def slices(self) -> Mapping[str, Sequence[str]]:
        """By column of the user's own the value of each image, `(n,)`; empty without one."""
        slices: Mapping[str, Sequence[str]] = getattr(self.source, "slices", {})
        return slices

    def count_turned(self, index: Sequence[int] | np.ndarray) -> int:
        """How many of the images at these positions are turned upright, as their EXIF says."""
        count: Callable[[Any], int] | None = getattr(self.source, "count_turned", None)
        return 0 if count is None else count(index)

    @property
    def transform(self) -> str:
        """How images are brought to one shape, in words."""
        span: tuple[float, float] | None = getattr(self.source, "span", None)
        scaled = (
            ""
            if span is None
            else f"values {spell_value(span[0])} to {spell_value(span[1])} as 0 to 1; "
        )
        return scaled + ("as stored" if self.fit is None else self.fit.describe())

    def batch(self, index: Sequence[int] | np.ndarray) -> Batch:
        """Read the images at these positions.

        Raises
        ------
        UsageError
            A file cannot be decoded, or is not of the shape of the others.
        """
        import torch

        positions = np.array(index, dtype=np.int64)
        x = np.empty((len(positions), *self.shape), dtype=np.float32)
        ids = np.empty(len(positions), dtype=np.uint64)
        for row, position in enumerate(positions.tolist()):
            x[row], ids[row] = self.read(position)
            if row % READ_AT_ONCE == 0:
                self.let_go()
        self.let_go()
        y = torch.from_numpy(self.labels[positions])
        return Batch(torch.from_numpy(x), y, ids, positions)

    def expect(self, index: Sequence[int] | np.ndarray) -> None:
        """These images are asked for next: a hint, for which nothing need be done."""

    def fingerprint(
        self,
        index: Sequence[int] | np.ndarray,
        progress: Callable[[int], object] | None = None,
    ) -> str:
        """SHA-256, in hexadecimal, of these images and labels in this order.

        It covers the undecoded bytes, the transform and the shape, so it says what was put in.
        The ids of a batch say what came out of the decoder.

        Parameters
        ----------
        index : sequence of int
            Positions in the data set.
        progress : callable, optional
            Called with 1 after each image.
        """
        digest = hashlib.sha256(f"{self.transform} {self.shape}".encode())
        for done, position in enumerate(np.array(index, dtype=np.int64)):
            raw = self.source.raw(int(position))
            if done % READ_AT_ONCE == 0:
                self.let_go()
            digest.update(struct.pack("<qq", len(raw), self.labels[position]))
            digest.update(raw)
            if progress is not None:
                progress(1)
        return digest.hexdigest()

    def let_go(self) -> None:
        """Give back the memory of what was read, where the source can."""
        give: Callable[[], object] | None = getattr(self.source, "let_go", None)
        if give is not None:
            give()

    def read(self, position: int) -> tuple[np.ndarray, int]:
        """One image `(c, h, w)`, float32 in [0, 1], and its id; UsageError as `batch`."""
        image = np.ascontiguousarray(self._image(position), dtype=np.float32)
        return image, image_id(image)

    def _image(self, position: int) -> np.ndarray:
        if self.fit is None:
            image = self.source.image(position)
        else:
            stored = read_stored(self.source, position)
            image = resize_image(stored, self.fit, self.source.where(position))
        if image.shape != self.shape:
            _, h, w = image.shape
            raise UsageError(
                f"{self.source.where(position)} is {w}x{h} pixels, the first image is "
                f"{self.shape[2]}x{self.shape[1]}: pass --size to bring all to one shape"
            )
        return image


def read_stored(source: Source, index: int) -> np.ndarray:
    """One image `(c, h, w)` as it is stored where the source can tell, which takes less memory."""
    decode: Callable[[int], np.ndarray] = getattr(source, "decode", source.image)
    return decode(index)


def check_shape_options(
    channels: int | None,
    size: int | None,
    resize: int | None,
    interpolation: str = "bilinear",
) -> None:
    """Refuse options that no images could meet; see `build_data`."""
    if interpolation not in RESAMPLING:
        raise UsageError(f"--interpolation must be one of {', '.join(RESAMPLING)}")
    if channels is not None:
        check_whole("channels", channels, 1)
    for name, pixels in (("--size", size), ("--resize", resize)):
        if pixels is not None:
            check_whole(name, pixels, 1, "pixel")
    if resize is not None and (size is None or resize < size):
        raise UsageError("--resize needs --size, and cannot be smaller than it")


def build_data(
    source: Source,
    *,
    channels: int | None = None,
    size: int | None = None,
    resize: int | None = None,
    interpolation: str = "bilinear",
    stretch: bool = False,
    even: bool = False,
) -> Data:
    """A source with its images brought to one shape, which its first image decides.

    Parameters
    ----------
    source : Source
        Where the images come from.
    channels : int, optional
        Channels that the model takes.
    size, resize, interpolation, stretch
        As in `robusteval.datasets.sources.open_data`.
    even : bool
        Whether all images are known to have the shape of the first.

    Raises
    ------
    UsageError
        The images have other channels.
    NothingEvaluated
        There are no images.
    """
    if len(source) == 0:
        raise NothingEvaluated(f"{source.name} holds no images: there is nothing to evaluate")
    c, h, w = read_stored(source, 0).shape
    if channels not in (None, c):
        raise UsageError(
            f"the model takes {channels} channels, the images of {source.name} have {c}: "
            "convert the images, or wrap the model so that it takes them"
        )
    if size is None or (even and (h, w) == (size, size)):
        return Data(source, (c, h, w))
    return Data(source, (c, size, size), Fit(size, resize or size, interpolation, stretch))


def draw(n: int, samples: int | None, seed: int) -> np.ndarray:
    """Choose the images of a run: the start of a seeded permutation.

    A smaller draw with the same seed is the start of a larger one.

    Parameters
    ----------
    n : int
        Images in the data set.
    samples : int or None
        How many to choose; all if None or more than there are.
    seed : int
        Not negative.

    Returns
    -------
    ndarray
        Positions, `(min(n, samples),)`, int64, none twice.
    """
    if samples is not None and samples < 1:
        raise UsageError(f"--samples must be at least 1, not {samples}")
    # The raw bits are all that NumPy promises never to change; Generator.permutation may.
    keys = np.random.PCG64(seed).random_raw(n)
    return np.argsort(keys).astype(np.int64)[:samples]


def image_id(x: np.ndarray) -> int:
    """Name an image by its content.

    Parameters
    ----------
    x : ndarray
        Image, `(c, h, w)`, values in [0, 1].

    Returns
    -------
    int
        The first eight bytes of the SHA-256 of its shape and its float32 values.
    """
    digest = hashlib.sha256(str(x.shape).encode())
    digest.update(x.astype("<f4").tobytes())
    return int.from_bytes(digest.digest()[:8], "big")
