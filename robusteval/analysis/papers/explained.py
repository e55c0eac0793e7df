"""What can be read for a table of a paper from an attack that was explained region by region."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from robusteval.analysis.papers.measures import Measured, Summary
from robusteval.runs.explanation_record import ExplanationRecord, FocusFigures, MeanOfImages
from robusteval.runs.statistics import wilson


class Explained(NamedTuple):
    """A figure of an explanation; `read` gives None where the network has none."""

    title: str
    summary: Summary
    read: Callable[[ExplanationRecord], Measured | None]


def keep_mean(mean: MeanOfImages) -> Measured | None:
    """A mean over images; None of nothing."""
    return Measured(mean.value, mean.low, mean.high, mean.n) if mean.n else None


def read_kind(name: str) -> Callable[[ExplanationRecord], Measured | None]:
    """The share of a type of region among those that matter."""
    return lambda record: keep_mean(record.regions.types[name])


def read_role(name: str) -> Callable[[ExplanationRecord], Measured | None]:
    """What changed places do, put back one by one."""
    return lambda r: None if r.noise is None else keep_mean(getattr(r.noise.roles, name))


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


def share(k: int, n: int) -> Measured | None:
    """A share with its interval; None of nothing."""
    return Measured(k / n, *wilson(k, n), n) if n else None


# by the first part of a name, as in focus:gradcam or focus_chance:cam
FOCUS: Mapping[str, tuple[str, Callable[[FocusFigures], Measured | None]]] = {
    "focus": ("interpretability score", lambda row: keep_mean(row.score)),
    "focus_chance": ("what noise would score", lambda row: keep_mean(row.chance)),
    "focus_elsewhere": (
        "score against the maps of other images",
        lambda row: keep_mean(row.elsewhere),
    ),
    "focus_beats": (
        "images that score above all controls",
        lambda row: share(row.focused.k, row.focused.n),
    ),
}
VIEWS = {"": "clean, label", "adversarial": "adversarial, predicted"}


def find_explained(name: str) -> Explained | None:
    """A figure of explanations by name; None if there is none of that name.

    ``focus:MAP`` is against the map of the original image for its label, ``focus:MAP:adversarial``
    against that of the attacked one for the class predicted.
    """
    kind, _, place = name.partition(":")
    if kind in EXPLAINED:
        return EXPLAINED[kind]
    if kind not in FOCUS:
        return None
    title, take = FOCUS[kind]
    chosen, _, view = place.partition(":")

    def read(record: ExplanationRecord) -> Measured | None:
        found = (row for row in record.focus if (row.map, row.view) == (chosen, VIEWS[view]))
        row: FocusFigures | None = next(found, None)
        return None if row is None else take(row)

    return Explained(title, "share" if kind == "focus_beats" else "mean", read)
