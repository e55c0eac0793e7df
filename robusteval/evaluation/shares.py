"""One part of a run: the images that one of several processes attacks, without asking the others.

Which images these are is decided by their contents alone, so that it depends on no order of images,
and images with the same content stay together.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np

from robusteval.datasets.dataset import Positions
from robusteval.errors import UsageError

SHARE = re.compile(r"([0-9]{1,6})/([0-9]{1,6})")


class Share(NamedTuple):
    """Part `part` of `of`, counted from 1; prints as ``3/16``."""

    part: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Share:
        """Read ``3/16``; UsageError if it is none."""
        found = SHARE.fullmatch(text.strip())
        share = cls(int(found[1]), int(found[2])) if found else None
        if share is None or not 1 <= share.part <= share.of:
            raise UsageError(f"a shard is written K/N with K from 1 to N, such as 3/16, not {text}")
        return share

    def __str__(self) -> str:
        return f"{self.part}/{self.of}"

    def check_images(self, ids: np.ndarray[Any, Any]) -> None:
        """Refuse a division into more parts than there are different images `ids` ``(n,)``."""
        different = len(np.unique(ids))
        if self.of > different:
            raise UsageError(
                f"--shard {self}: there are {different} different images, so divide them by no more"
            )

    def own(self, rows: Positions, ids: np.ndarray[Any, Any]) -> Positions:
        """Those of some rows ``(m,)`` that are of this part; `ids` ``(n,)`` are of all images."""
        mine: Positions = rows[find_owners(ids, self.of)[rows] == self.part]
        return mine

    def choose(self, batches: list[Positions]) -> list[Positions]:
        """Every `of`-th batch, where batches are part of what is computed."""
        return batches[self.part - 1 :: self.of]


def find_owners(ids: np.ndarray[Any, Any], of: int) -> Positions:
    """Which of so many parts, counted from 1, each image ``(n,)`` belongs to, by content id."""
    rank = np.unique(ids, return_inverse=True)[1].reshape(-1)
    return rank.astype(np.int64) % of + 1
