"""What can be read for a table of a paper from attacks on maps alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from robusteval.analysis.papers.measures import ORDER, Measured, Summary
from robusteval.runs.metrics import rate
from robusteval.runs.statistics import bounded_mean
from robusteval.runs.types import Flags, Values


class MapAttack(NamedTuple):
    """What came of an attack on the maps of some images, all of them right before."""

    name: str  # as reports call it
    ids: Values  # (n,) of the images' content
    tau: Values  # (n,) Kendall's tau of the label's map before and after
    kept: Flags  # (n,) whether the label is predicted after it, too


class OnMaps(NamedTuple):
    """A figure of such an attack."""

    title: str
    summary: Summary
    read: Callable[[MapAttack], Measured]
    read_images: Callable[[MapAttack], Values]  # (n,) nan where an image does not count


def read_kept(attack: MapAttack) -> Measured:
    """The share of images that are right after it, too."""
    found = rate(np.asarray(attack.kept))
    return Measured(found.value, *found.interval, found.n)


ON_MAPS: Mapping[str, OnMaps] = {
    "tau_all": OnMaps(
        "Kendall's tau of the label's map, of all images",
        "mean",
        lambda attack: Measured(*bounded_mean(attack.tau, ORDER)),
        lambda attack: attack.tau,
    ),
    "tau_kept": OnMaps(
        "Kendall's tau of the label's map, of images that stay right",
        "mean",
        lambda attack: Measured(*bounded_mean(attack.tau[attack.kept], ORDER)),
        lambda attack: np.where(attack.kept, attack.tau, np.nan),
    ),
    "label_kept": OnMaps(
        "images that stay right", "share", read_kept, lambda attack: np.asarray(attack.kept)
    ),
}


def find_on_maps(name: str) -> OnMaps | None:
    """A figure of attacks on maps by name; None if there is none of that name."""
    return ON_MAPS.get(name)
