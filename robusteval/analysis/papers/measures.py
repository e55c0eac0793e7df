"""What can be read of an attack for a table of a paper: a number per image, and their summary."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import numpy as np

from robusteval.analysis.papers.smallest_settings import SMALLEST
from robusteval.runs.metrics import find_fooled
from robusteval.runs.statistics import (
    Difference,
    bounded_mean,
    median,
    median_interval,
    paired_difference,
    paired_interval,
    wilson,
)
from robusteval.runs.types import Flags, Outcome, Values

Summary = Literal["share", "mean", "median"]
SHARE, ORDER, SIZE = (0.0, 1.0), (-1.0, 1.0), (0.0, math.inf)  # spans of values


class Measured(NamedTuple):
    """A number with its 95 % interval, over `n` images; nan where there is none."""

    value: float
    low: float
    high: float
    n: int


class Measure(NamedTuple):
    """What is read of each image, of which images it counts, and how it is summed up."""

    title: str
    summary: Summary
    read: Callable[[Outcome], Values]  # (n,)
    among: Callable[[Outcome], Flags]  # (n,) the images that count
    shared: bool = False  # by the images of a batch, so that their spread gives no interval
    span: tuple[float, float] = (-math.inf, math.inf)  # beyond which no value can lie

    def summarize(self, outcome: Outcome) -> Measured:
        """The number of an attack."""
        return self.summarize_values(self.read(outcome)[self.among(outcome)])

    def summarize_values(self, values: Values, pull: Values | None = None) -> Measured:
        """The number of the values ``(n,)`` of the images that count; shares may be fractions.

        `pull` ``(n,)`` is what else varies from image to image in a share, see `OperatingPoint`.
        """
        if self.summary == "share":
            k, n = float(values.sum()), len(values)
            more = 1.0 if pull is None or not n else inflate(values + pull, k / n * (1 - k / n))
            return Measured(k / n if n else math.nan, *wilson(k / more, n / more), n)
        if self.summary == "mean":
            known = Measured(*bounded_mean(values, self.span))
            return known._replace(low=math.nan, high=math.nan) if self.shared else known
        return summarize_median(values[~np.isnan(values)])

    def compare_values(
        self, first: Values, second: Values, both: Flags, pull: Values | None = None
    ) -> Difference:
        """How much larger the first values ``(n,)`` are than the second, of the images of `both`.

        Means of the differences of medians' values, too; of shares with the interval for pairs.
        `pull` ``(k,)`` is what else varies in their difference, of the images of `both`.
        """
        first, second = first.astype(np.float64), second.astype(np.float64)
        found = paired_difference(first, second, both)
        if self.summary == "share":
            gap = (first - second)[both]
            lost, gained = float(gap[gap > 0].sum()), float(-gap[gap < 0].sum())
            n, more = len(gap), 1.0
            if pull is not None and n:
                more = inflate(gap + pull, (lost + gained) / n - ((lost - gained) / n) ** 2)
            low, high = paired_interval(lost / more, gained / more, n / more)
            return found._replace(low=low, high=high)
        return found


def inflate(values: Values, variance: float) -> float:
    """How many times the variance that an interval is made for values ``(n,)`` have, at least 1.

    An interval of so many times fewer images is as wide as theirs (the design effect of surveys).
    """
    times = float(values.var()) / variance if variance > 0 else 1.0
    return times if times > 1 + 1e-9 else 1.0  # and not by rounding


def summarize_median(values: Values) -> Measured:
    """The median of values ``(n,)``, infinite where half of them are; then without an interval."""
    low, high = median_interval(values)
    ends = (low, high) if math.isfinite(high) else (math.nan, math.nan)
    return Measured(median(values), *ends, len(values))


def all_attacked(outcome: Outcome) -> Flags:
    """The images that were right at first."""
    return outcome.attacked


def successes(outcome: Outcome) -> Flags:
    """The images on which the attack reached its goal."""
    return outcome.success()


def all_images(outcome: Outcome) -> Flags:
    """All images of the run, those that were wrong from the start too."""
    return np.ones(len(outcome.attacked), dtype=np.bool_)


def read_column(name: str) -> Callable[[Outcome], Values]:
    """A column as floats; nan where the run does not have it."""

    def read(outcome: Outcome) -> Values:
        if name not in outcome.columns:
            return np.full(len(outcome.attacked), math.nan)
        return outcome.columns[name].astype(np.float64)

    return read


def read_reached(name: str) -> Callable[[Outcome], Values]:
    """A column of the images on which the attack reached its goal; infinite where it did not."""
    read = read_column(name)
    return lambda outcome: np.where(outcome.success(), read(outcome), np.inf)


def read_lost(outcome: Outcome) -> Values:
    """What an image lacks to an SSIM of 1."""
    return 1 - read_column("ssim")(outcome)


def fooled_within(most: int) -> Callable[[Outcome], Values]:
    """Whether an image is fooled by so many changed values at most."""
    changed = read_column("l0")
    return lambda outcome: outcome.success() & (changed(outcome) <= most)


def count_passes(outcome: Outcome) -> Values:
    """Forward and backward passes of each image."""
    return np.asarray(outcome.columns["forwards"] + outcome.columns["backwards"], dtype=np.float64)


MEASURES: Mapping[str, Measure] = {
    "fooled": Measure("images fooled", "share", Outcome.success, all_attacked),
    "fooled_all": Measure(
        "images whose label changes, of all",
        "share",
        lambda o: o.columns["pred_adv"] != o.columns["pred_clean"],
        all_images,
    ),
    "fooled_8bit": Measure(
        "images fooled when saved in 8 bits",
        "share",
        lambda o: o.success("pred_8bit"),
        all_attacked,
    ),
    # of an outcome on the other network, see `Results.measure_transfer`
    "transfer": Measure(
        "images fooled on a second network, of those that both have right",
        "share",
        Outcome.success,
        all_attacked,
    ),
    "robust": Measure(
        "images right after the attack, of all",
        "share",
        lambda o: o.attacked & ~o.success(),
        all_images,
    ),
    "ssim": Measure("mean SSIM", "mean", read_column("ssim"), all_attacked, span=ORDER),
    "psnr": Measure("mean PSNR in dB", "mean", read_column("psnr"), all_attacked),
    # of images at the smallest setting that fools them, see `smallest_settings.take_smallest`
    "smallest": Measure(
        "smallest setting that fools, median; no end where none does",
        "median",
        read_reached(SMALLEST),
        all_attacked,
    ),
    # and not what is left, whose digits would all be nines
    "ssim_lost": Measure("mean 1 - SSIM of the images fooled", "mean", read_lost, successes),
    "psnr_fooled": Measure(
        "mean PSNR in dB of the images fooled", "mean", read_column("psnr"), successes
    ),
    "confidence": Measure(
        "probability of the class reached",
        "mean",
        read_column("confidence_adv"),
        successes,
        span=SHARE,
    ),
    "l0": Measure(
        "values changed, mean of successes", "mean", read_column("l0"), successes, span=SIZE
    ),
    # without an image that is not fooled an attack that rarely succeeds would look the sparser
    "l0_median": Measure(
        "values changed, median; no end where an image is not fooled",
        "median",
        read_reached("l0"),
        all_attacked,
    ),
    "l0_pixels": Measure(
        "pixels changed, median; no end where an image is not fooled",
        "median",
        read_reached("l0_pixels"),
        all_attacked,
    ),
    "l2": Measure(
        "l2 distance, mean of successes", "mean", read_column("l2"), successes, span=SIZE
    ),
    "linf": Measure(
        "linf distance, mean of successes", "mean", read_column("linf"), successes, span=SIZE
    ),
    "passes": Measure("passes per image", "mean", count_passes, all_attacked, span=SIZE),
    "seconds": Measure(
        "seconds per image", "mean", read_column("seconds"), all_attacked, shared=True, span=SIZE
    ),
    # behind a detector, see `robusteval.analysis.papers.evading`
    "behind_reached": Measure("images fooled, flagged or not", "share", find_fooled, all_attacked),
    "behind_flagged": Measure(
        "flagged, of the images fooled", "share", lambda o: o.columns["flagged"], find_fooled
    ),
    "behind_passed": Measure(
        "images fooled and not flagged", "share", Outcome.success, all_attacked
    ),
    "behind_passes": Measure("passes per image", "mean", count_passes, all_attacked, span=SIZE),
    "edge_energy": Measure(
        "share of the squared change on edges",
        "mean",
        read_column("edge_energy"),
        successes,
        span=SHARE,
    ),
}
# of maps, each for an interpreter: map_distance:grad
OF_MAPS = {
    "map_distance": "mean distance of the maps",
    "map_l2": "l2 distance of the maps",
    "map_iou": "overlap of the highest fifth of the maps",
    "map_kendall": "Kendall's tau of the maps",
    "map_spearman": "Spearman's rank correlation of the maps",
    "map_noise": "distance of the maps under noise of equal size",
}
ORDERS = ("map_kendall", "map_spearman")
# the same of all images that were right at first, fooled or not
OF_ALL_MAPS = {"map_kendall_all": ("map_kendall", "Kendall's tau of the maps, fooled or not")}
# of where a change lies, each beside the map of an interpreter: energy_ratio:gradcam_plus_plus
OF_PLACES = {
    "precision": "share of the changed pixels that are relevant",
    "perturbed": "share of the pixels that are changed",
    "recall": "share of the relevant pixels that are changed",
    "iou": "overlap of changed and relevant pixels",
    "iou_outside": "overlap of changed and irrelevant pixels",
    "precision_at": "share of the most changed twentieth that is relevant",
    "noise_precision_at": "the same of noise of equal size",
    "energy_ratio": "squared change on relevant pixels, over their area",
    "noise_energy_ratio": "the same of noise of equal size",
}


def find_measure(name: str) -> Measure:
    """A measure by name; ValueError if there is none."""
    kind, _, rest = name.partition(":")
    if kind == "fooled_within":
        title = f"images fooled by {int(rest)} changed values at most"
        return Measure(title, "share", fooled_within(int(rest)), all_attacked)
    if kind in OF_MAPS:
        span = ORDER if kind in ORDERS else SHARE if kind == "map_iou" else SIZE
        return Measure(OF_MAPS[kind], "mean", read_column(name), successes, span=span)
    if kind in OF_ALL_MAPS:
        column, title = OF_ALL_MAPS[kind]
        values = read_column(f"{column}:{rest}")
        return Measure(title, "mean", values, all_attacked, span=ORDER)
    if kind in OF_PLACES:
        span = SIZE if kind.endswith("energy_ratio") else SHARE
        return Measure(OF_PLACES[kind], "mean", read_column(name), all_attacked, span=span)
    if name not in MEASURES:
        raise ValueError(f"no measure is called {name}")
    return MEASURES[name]
