"""Images that a run has decoded, kept for the next attack as far as there is room.

Those that are not kept yet are decoded ahead by threads, where a source allows it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from robusteval.datasets.dataset import ArraySource, Data
from robusteval.datasets.images import scale_levels
from robusteval.datasets.reading_ahead import ReadAhead

MOST = 2**30  # bytes of images that are kept: 7,000 of 224x224 pixels
MOST_AHEAD = 2**27  # bytes of images that are decoded and not asked for yet: 200 such photos
SHARE = 4  # of the memory that is free, the part that they may take


class Kept(NamedTuple):
    """An image `(c, h, w)`: uint8 where it is one of 256 levels, else float32; and its id."""

    pixels: np.ndarray
    id: int


@dataclass(eq=False)
class Shelf:
    """Images by position, until there is no more room.

    Attributes
    ----------
    room : int
        Bytes that are left.
    images : dict
        Those that are kept.
    """

    room: int
    images: dict[int, Kept] = field(default_factory=dict)

    def put(self, position: int, image: np.ndarray, id: int) -> None:
        """Keep an image, float32, if there is room and it comes back with the same bits."""
        if self.room <= 0:
            return
        levels = np.rint(image * 255).astype(np.uint8)
        again = scale_levels(levels)
        same = again.shape == image.shape and again.tobytes() == image.tobytes()
        pixels = levels if same else image.copy()
        self.room -= pixels.nbytes
        self.images[position] = Kept(pixels, id)

    def take(self, position: int) -> tuple[np.ndarray, int] | None:
        """An image as float32 and its id; None if it is not here."""
        found = self.images.get(position)
        return None if found is None else (scale_levels(found.pixels), found.id)


@dataclass(frozen=True, eq=False)
class KeptData(Data):
    """Data of which each image is decoded and hashed once, as far as there is room."""

    # not of the arguments: data that are brought to another shape are other images
    shelf: Shelf = field(init=False, default_factory=lambda: Shelf(find_room()))
    ahead: ReadAhead = field(init=False)

    def __post_init__(self) -> None:
        size = 4 * int(np.prod(self.shape))
        plain = Data(self.source, self.shape, self.fit)  # and not itself, which it would keep alive
        ahead = ReadAhead(plain.read, max(MOST_AHEAD // size, 1))
        object.__setattr__(self, "ahead", ahead)

    def expect(self, index: Sequence[int] | np.ndarray) -> None:
        """Let threads decode these, as far as they are not kept; see `read_ahead`."""
        positions = np.array(index, dtype=np.int64).tolist()
        self.ahead.expect([each for each in positions if each not in self.shelf.images])

    def read(self, position: int) -> tuple[np.ndarray, int]:
        """One image `(c, h, w)`, float32 in [0, 1], and its id."""
        found = self.shelf.take(position)
        if found is None:
            found = self.ahead.take(position) or super().read(position)
            self.shelf.put(position, *found)
        return found


def keep_decoded(data: Data) -> Data:
    """The same data, whose images are kept once they were decoded; itself if they need not be."""
    source = data.source
    at_hand = isinstance(source, ArraySource) and isinstance(source.images, np.ndarray)
    if type(data) is not Data or (at_hand and data.fit is None):
        return data
    return KeptData(data.source, data.shape, data.fit)


@contextmanager
def read_ahead(data: Data) -> Iterator[None]:
    """Decode the images that data expect by threads, inside; where these could not, do nothing."""
    if isinstance(data, KeptData) and getattr(data.source, "in_threads", False):
        with data.ahead.start_threads():
            yield
    else:
        yield


def find_room() -> int:
    """Bytes that images may take, of the memory that is free where that is known."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return MOST // SHARE
    return min(MOST, free // SHARE)
