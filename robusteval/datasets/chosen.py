"""Some images of a data set as a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from robusteval.datasets.dataset import Data, Positions, Source, read_stored


@dataclass(frozen=True, eq=False)
class ChosenSource:
    """The images of a source at some positions ``(n,)``, in that order."""

    source: Source
    positions: Positions

    @property
    def labels(self) -> np.ndarray[Any, Any]:
        """`(n,)`, int64."""
        return np.asarray(self.source.labels[self.positions])

    @property
    def name(self) -> str:
        """What the data set is called."""
        return self.source.name

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names in label order, where the data set has them."""
        return self.source.class_names

    @property
    def notes(self) -> tuple[str, ...]:
        """What its user should read."""
        return self.source.notes

    @property
    def span(self) -> tuple[float, float] | None:
        """Values of black and white, where they are not those of the type."""
        span: tuple[float, float] | None = getattr(self.source, "span", None)
        return span

    def __len__(self) -> int:
        return len(self.positions)

    def where(self, index: int) -> str:
        """Name an image as the source does."""
        return self.source.where(int(self.positions[index]))

    def raw(self, index: int) -> bytes:
        """Give the bytes that stand for an image."""
        return self.source.raw(int(self.positions[index]))

    def image(self, index: int) -> np.ndarray[Any, Any]:
        """Give an image, `(c, h, w)`, float32 in [0, 1]."""
        return self.source.image(int(self.positions[index]))

    def decode(self, index: int) -> np.ndarray[Any, Any]:
        """Give an image as it is stored, where the source can tell."""
        return read_stored(self.source, int(self.positions[index]))


def choose_images(data: Data, positions: Positions) -> Data:
    """The images of some data at these positions ``(n,)``, as data."""
    return Data(ChosenSource(data.source, positions), data.shape, data.fit)
