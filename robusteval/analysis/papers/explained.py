"""What can be read for a table of a paper from an attack that was explained region by region."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from robusteval.analysis.papers.measures import Measured, Summary
from robusteval.runs.explanation_record import (
    ExplanationRecord,
    FocusFigures,
    MapHeight,
    MeanOfImages,
    UnitFigures,
)
from robusteval.runs.statistics import wilson
from robusteval.runs.types import Values

ReadImages = Callable[[ExplanationRecord], Values | None]


class Explained(NamedTuple):
    """A figure of an explanation; `read` gives None where the network has none."""

    title: str
    summary: Summary
    read: Callable[[ExplanationRecord], Measured | None]
    # the same of each image ``(n,)``, nan where it was not fooled; None where that is not kept
    read_images: ReadImages = lambda _: None
    counted: str = "images"  # what `n` of it is


def keep_mean(mean: MeanOfImages) -> Measured | None:
    """A mean over images; None of nothing."""
    return Measured(mean.value, mean.low, mean.high, mean.n) if mean.n else None


def read_kind(name: str) -> Callable[[ExplanationRecord], Measured | None]:
    """The share of a type of region among those that matter."""
    return lambda record: keep_mean(record.regions.types[name])


def read_role(name: str) -> Callable[[ExplanationRecord], Measured | None]:
    """What changed places do, put back one by one."""
    return lambda r: None if r.noise is None else keep_mean(getattr(r.noise.roles, name))


def share(k: int, n: int) -> Measured | None:
    """A share with its interval; None of nothing."""
    return Measured(k / n, *wilson(k, n), n) if n else None


def read_units(
    take: Callable[[UnitFigures], Measured | None],
) -> Callable[[ExplanationRecord], Measured | None]:
    """A figure of units, counted in `n`; None where there are none, or it is not defined."""

    def read(record: ExplanationRecord) -> Measured | None:
        found = None if record.units is None else take(record.units)
        return None if found is None or math.isnan(found.value) else found

    return read


def average_moved(units: UnitFigures, kind: str) -> Measured:
    """How far the most moved units are moved; without an interval, as these were chosen by it."""
    values = [getattr(unit, kind) for unit in units.most_moved]
    return Measured(float(np.mean(values)), math.nan, math.nan, len(values))


EXPLAINED: Mapping[str, Explained] = {
    "suppression": Explained(
        "share of regions that hold the true class down", "mean", read_kind("suppression")
    ),
    "promotion": Explained(
        "share of regions that push another class up", "mean", read_kind("promotion")
    ),
    "balanced": Explained("share of regions that do both", "mean", read_kind("balanced")),
    "size_pearson": Explained(
        "Pearson's correlation of a region's effect and its change",
        "mean",
        lambda record: keep_mean(record.regions.with_size.pearson),
    ),
    "size_kendall": Explained(
        "Kendall's tau of a region's effect and its change",
        "mean",
        lambda record: keep_mean(record.regions.with_size.kendall),
    ),
    "obscuring": Explained("share of obscuring places", "mean", read_role("obscuring")),
    "leading": Explained("share of leading places", "mean", read_role("leading")),
    "fall": Explained("fall of the true logit by a place", "mean", read_role("fall")),
    "rise": Explained("rise of the other logit by a place", "mean", read_role("rise")),
    "explained": Explained(
        "images fooled, of those explained",
        "share",
        lambda record: share(record.samples.fooled, record.samples.attacked),
    ),
}

# of units, which is what their `n` counts
OF_UNITS: Mapping[str, tuple[str, Summary, Callable[[UnitFigures], Measured | None]]] = {
    "units_matched": (
        "units that match a concept, of all",
        "share",
        lambda units: share(units.matched, units.units),
    ),
    "moved_matched": (
        "units that match a concept, of the ten most moved",
        "share",
        lambda units: share(sum(unit.matched for unit in units.most_moved), len(units.most_moved)),
    ),
    "moved_attack": (
        "standard deviations by which the attack moves these ten",
        "mean",
        lambda units: average_moved(units, "attack"),
    ),
    "moved_noise": (
        "standard deviations by which noise of equal norm moves them",
        "mean",
        lambda units: average_moved(units, "noise"),
    ),
    "units_correlation": (
        "Spearman's correlation, over units, of being moved and matching a concept",
        "mean",
        lambda units: Measured(units.correlation, units.low, units.high, units.units),
    ),
    "units_noise": (
        "the same of being moved by noise of equal norm",
        "mean",
        lambda units: Measured(units.noise, math.nan, math.nan, units.units),
    ),
    "units_gain": (
        "how much larger the correlation is than that of noise",
        "mean",
        lambda units: Measured(units.gain, units.gain_low, units.gain_high, units.units),
    ),
}

# by the first part of a name, as in focus:gradcam or focus_chance:cam; the last has no such value
FOCUS: Mapping[
    str,
    tuple[
        str,
        Callable[[FocusFigures], Measured | None],
        Callable[[FocusFigures], Sequence[float] | None],
    ],
] = {
    "focus": ("interpretability score", lambda row: keep_mean(row.score), lambda row: row.scores),
    "focus_chance": (
        "what noise would score",
        lambda row: keep_mean(row.chance),
        lambda row: row.chances,
    ),
    "focus_elsewhere": (
        "score against the maps of other images",
        lambda row: keep_mean(row.elsewhere),
        lambda row: row.elsewheres,
    ),
    "focus_shifted": (
        "95 % of what the change scores elsewhere in its image",
        lambda row: keep_mean(row.shifted),
        lambda row: row.shifts,
    ),
    "focus_beats": (
        "images that score above all controls",
        lambda row: share(row.focused.k, row.focused.n),
        lambda _: None,
    ),
}
VIEWS = {"": "clean, label", "adversarial": "adversarial, predicted"}


def find_explained(name: str) -> Explained | None:
    """A figure of explanations by name; None if there is none of that name.

    ``focus:MAP`` is against the map of the original image for its label, ``focus:MAP:adversarial``
    against that of the attacked one for the class predicted. ``height:MAP:IMAGE:CLASS`` is how high
    a map rises, the image ``clean`` or ``adversarial``, the class ``label`` or ``predicted``.
    """
    kind, _, place = name.partition(":")
    if kind in EXPLAINED:
        return EXPLAINED[kind]
    if kind in OF_UNITS:
        of_units, summary, take_units = OF_UNITS[kind]
        return Explained(of_units, summary, read_units(take_units), counted="units")
    chosen, _, view = place.partition(":")
    if kind == "height":
        return find_height(chosen, view.replace(":", ", "))
    if kind not in FOCUS:
        return None
    title, take, take_images = FOCUS[kind]

    def find_row(record: ExplanationRecord) -> FocusFigures | None:
        rows = (row for row in record.focus if (row.map, row.view) == (chosen, VIEWS[view]))
        return next(rows, None)

    def read(record: ExplanationRecord) -> Measured | None:
        row = find_row(record)
        return None if row is None else take(row)

    def read_images(record: ExplanationRecord) -> Values | None:
        row = find_row(record)
        values = None if row is None else take_images(row)
        return None if values is None else np.array(values)

    return Explained(title, "share" if kind == "focus_beats" else "mean", read, read_images)


def find_height(chosen: str, view: str) -> Explained:
    """How high a map rises, as a share of the highest of the four of its image."""

    def find_row(record: ExplanationRecord) -> MapHeight | None:
        rows = (row for row in record.heights if (row.map, row.view) == (chosen, view))
        return next(rows, None)

    def read(record: ExplanationRecord) -> Measured | None:
        row = find_row(record)
        return None if row is None else keep_mean(row.height)

    def read_images(record: ExplanationRecord) -> Values | None:
        row = find_row(record)
        return None if row is None else np.array(row.heights)

    image, _, shown = view.partition(", ")
    when = {"clean": "before", "adversarial": "after"}[image]
    of = {"label": "label", "predicted": "class reached"}[shown]
    return Explained(f"height of the map of the {of} {when}", "mean", read, read_images)
