"""The few images of a cell that are kept for people to look at.

Which ones does not depend on batches or stops: the easiest, the hardest, and of a handful that
their content picks at random the one nearest to the median.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from robusteval.runs.pictures import pair_maps
from robusteval.runs.types import Columns, Picture, Threat

SPARE = 8  # candidates for the median

Array = np.ndarray[Any, Any]


class Gallery:
    """The candidates of one cell, taken up from what an earlier run left."""

    def __init__(self, found: Columns) -> None:
        self._kept = found

    @property
    def candidates(self) -> Columns:
        """Row, id, hardness, image and change of each; arrays ``(m, …)``."""
        return self._kept

    def offer(
        self,
        rows: Array,
        ids: Array,
        hard: Array,
        images: Callable[[Array], tuple[Array, Array]],
        maps: Columns | None = None,
    ) -> None:
        """Consider a batch.

        Parameters
        ----------
        rows, ids, hard : ndarray
            Position, content id and hardness of each image ``(n,)``.
        images : callable
            Given positions in the batch ``(m,)``: the images ``(m, h, w, c)`` uint8 and what was
            changed of them, float. Called for those that are kept.
        maps : dict of ndarray, optional
            Of all images the maps ``(n, h', w')`` in [0, 1] that explain them, by
            ``benign:NAME`` and ``changed:NAME``; the same names at every offer.
        """
        old = self._kept.get("row", np.zeros(0, np.int64))
        new = ~np.isin(rows, old)
        merged = {
            "row": np.concatenate([old, rows[new]]),
            "id": np.concatenate([self._kept.get("id", ids[:0]), ids[new]]),
            "hard": np.concatenate([self._kept.get("hard", hard[:0]), hard[new]]),
        }
        keep = choose_candidates(merged["id"], merged["hard"])
        stay, come = keep[keep < len(old)], keep[keep >= len(old)] - len(old)
        clean, delta = images(np.flatnonzero(new)[come])
        arrays = {"clean": clean, "delta": delta.astype(np.float16)}
        for name, values in (maps or {}).items():
            arrays[name] = values[new][come].astype(np.float16)
        self._kept = {name: column[keep] for name, column in merged.items()} | {
            name: join_images(self._kept.get(name), stay, array) for name, array in arrays.items()
        }

    def join(self, other: Columns) -> None:
        """Consider the candidates among other images of the same cell."""
        if not self._kept or not other:
            self._kept = self._kept or other
            return
        new = ~np.isin(other["row"], self._kept["row"])
        both = {
            name: np.concatenate([values, other[name][new]]) for name, values in self._kept.items()
        }
        keep = choose_candidates(both["id"], both["hard"])
        self._kept = {name: values[keep] for name, values in both.items()}

    def choose_pictures(self, hard: Array) -> list[Picture]:
        """Choose the easiest, median and hardest image; `hard` is the hardness of all ``(n,)``."""
        if not len(self._kept.get("row", ())):
            return []
        order = np.lexsort((self._kept["id"], self._kept["hard"]))
        places = {"easiest": order[0]}
        if len(order) > 1:
            places["hardest"] = order[-1]
        if len(order) > 2:
            between = order[1:-1]
            # by rank, as the hardness of an image that withstood may be infinite
            rank = np.searchsorted(np.sort(hard), self._kept["hard"][between])
            places["median"] = between[np.abs(rank - len(hard) // 2).argmin()]
        return [self._picture(place, places[place]) for place in PLACES if place in places]

    def _picture(self, place: str, at: int) -> Picture:
        c = self._kept
        maps = {name: (one[at], other[at]) for name, one, other in pair_maps(c)}
        delta = c["delta"][at].astype(np.float32)
        return Picture(place, int(c["row"][at]), c["clean"][at], delta, maps)


PLACES = ("easiest", "median", "hardest")


def choose_candidates(ids: Array, hard: Array) -> Array:
    """Which of these ``(n,)`` may still become a picture, at most `SPARE` and two."""
    order = np.lexsort((ids, hard))
    return np.unique(np.concatenate([order[:1], order[-1:], np.argsort(ids)[:SPARE]]))


def join_images(old: Array | None, stay: Array, new: Array) -> Array:
    """The old images ``(m, …)`` at the places `stay`, and behind them the new ones."""
    return new if old is None else np.concatenate([old[stay], new])


def measure_hardness(columns: Columns, threat: Threat) -> Array:
    """How far from its goal an attack ended on each image ``(n,)``.

    With a radius the margin that is left; without, how far the success is. Infinite where a class
    was to be reached and was not, and without a radius where there is no success.
    """
    reached = columns["margin_adv"] < 0
    if threat.targeted:
        reached = columns["pred_adv"] == columns["target"]
    if threat.eps is not None:
        missed = ~reached if threat.targeted else np.zeros(len(reached), np.bool_)
        return np.where(missed, np.inf, columns["margin_adv"])
    size = 1 - columns["ssim"] if threat.norm == "ssim" else columns.get(threat.norm)
    return np.where(reached, columns["l2"] if size is None else size, np.inf)
