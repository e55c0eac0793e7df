"""What can be read for a table of a paper from a detector of several interpreters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from robusteval.analysis.papers.measures import Measured, Summary
from robusteval.runs.detector_record import Combination, EstimateOfImages, Proportion


class Detected(NamedTuple):
    """A figure of a detector; `read` gives None where there is none."""

    title: str
    summary: Summary
    read: Callable[[Combination], Measured | None]


def read_estimate(name: str) -> Callable[[Combination], Measured | None]:
    """An accuracy or an area with its interval, over the images that judge it."""

    def read(found: Combination) -> Measured | None:
        known: EstimateOfImages | None = getattr(found, name)
        if known is None:
            return None
        if known.low == known.high:  # what does not vary tells no interval
            return Measured(known.value, math.nan, math.nan, known.n)
        return Measured(known.value, known.low, known.high, known.n)

    return read


def read_proportion(name: str) -> Callable[[Combination], Measured | None]:
    """A share of rows."""

    def read(found: Combination) -> Measured | None:
        known: Proportion = getattr(found, name)
        return Measured(known.k / known.n, known.low, known.high, known.n) if known.n else None

    return read


DETECTED: Mapping[str, Detected] = {
    "detector_as_published": Detected(
        "accuracy, parted by row, features alone", "share", read_estimate("as_published")
    ),
    "detector_grouped": Detected("accuracy, parted by image", "share", read_estimate("grouped")),
    "detector_auc": Detected("AUC, parted by image", "mean", read_estimate("auc")),
    "detector_flagged": Detected(
        "attacked images flagged, at 5 % false alarms", "share", read_proportion("flagged")
    ),
    "detector_alarms": Detected(
        "images as they are flagged, at the same threshold",
        "share",
        read_proportion("false_alarms"),
    ),
    "detector_features": Detected(
        "AUC without the statistics of agreement", "mean", read_estimate("without_statistics")
    ),
    "detector_unseen": Detected(
        "AUC on classes that had no say", "mean", read_estimate("unseen_classes")
    ),
}


def find_detected(name: str) -> Detected | None:
    """A figure of detectors by name; None if there is none of that name."""
    return DETECTED.get(name)
