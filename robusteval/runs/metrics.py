"""Numbers from the columns of a run: pure functions, every empty case decided.

A rate over no images has no value (nan) and the interval (0, 1); a distance over no successes is
nan; a cost per image over no attacked images is nan. Intervals and tests stand in `statistics`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from robusteval.errors import check_argument
from robusteval.runs.statistics import Difference, Rate, mean, median, paired_difference
from robusteval.runs.types import Defended, Flags, Outcome, Threat

NORMS = ("l0", "l0_pixels", "l1", "l2", "linf")


class Distance(NamedTuple):
    """How far successes went, in the norm of their threat."""

    median: float
    mean: float


class Distances(NamedTuple):
    """How far successes went: medians of the norms, means of the similarities."""

    l0: float
    l0_pixels: float
    l1: float
    l2: float
    linf: float
    ssim: float
    psnr: float


class Curve(NamedTuple):
    """How many images hold out at rising distances."""

    budgets: np.ndarray[Any, Any]  # (m,) float64, rising from 0
    robust: np.ndarray[Any, Any]  # (m,) int, falling


class Cost(NamedTuple):
    """Passes through the network per attacked image, and seconds altogether."""

    forwards: float
    backwards: float
    seconds: float


class Faults(NamedTuple):
    """On how many images an attack broke its promise; all were repaired before judging."""

    left_box: int
    left_ball: int
    not_finite: int  # pixels
    logits_not_finite: int  # not repaired: counted as a success


def accuracy(clean: Mapping[str, np.ndarray[Any, Any]]) -> Rate:
    """Images classified correctly, of all; logits that are not finite are never right.

    Behind a detector, an image that is flagged is not right either.
    """
    return rate(find_right(clean)) if clean else Rate(0, 0)


def find_right(clean: Mapping[str, np.ndarray[Any, Any]]) -> Flags:
    """The images ``(n,)`` that are classified correctly and raise no alarm."""
    hit: Flags = (clean["pred_clean"] == clean["label"]) & (clean["pred_clean"] >= 0)
    return hit & ~clean["flagged"] if "flagged" in clean else hit


def rate(mask: Flags) -> Rate:
    """How many are true, of all."""
    return Rate(int(mask.sum()), len(mask))


def robust_accuracy(outcome: Outcome, pred: str = "pred_adv") -> Rate:
    """Images right at first and still after the attack, of all different images of the cell.

    An image that is in the data several times counts once, so that the interval is one of
    independent draws. UsageError for what is no outcome.
    """
    check_argument("an outcome", outcome, Outcome, "give one of run.attacks")
    return worst_case([outcome.keep_different()], pred)


def success_rate(outcome: Outcome, pred: str = "pred_adv") -> Rate:
    """Images on which the attack reached its goal, of those attacked."""
    return rate(outcome.success(pred)[outcome.attacked])


def worst_case(outcomes: Sequence[Outcome], pred: str = "pred_adv") -> Rate:
    """Images right at first and after every one of these attacks, of all.

    ValueError for no attacks, or attacks on different images.
    """
    if not outcomes:
        raise ValueError("the worst case of no attacks")
    return rate(outcomes[0].attacked & ~find_breaks(outcomes, pred).any(0))


def unique_breaks(outcomes: Sequence[Outcome], pred: str = "pred_adv") -> list[int]:
    """For each attack, on how many images it alone succeeds: its marginal gain.

    ValueError for attacks on different images.
    """
    return count_alone(find_breaks(outcomes, pred))


def count_alone(broken: Flags) -> list[int]:
    """Of successes ``(attacks, n)`` for each attack the images that no other breaks."""
    alone = broken & (broken.sum(0) == 1)
    return [int(count) for count in alone.sum(1)]


def find_breaks(outcomes: Sequence[Outcome], pred: str = "pred_adv") -> Flags:
    """Successes ``(attacks, n)``; ValueError if the images are not the same in each row."""
    for name in ("id", "attacked"):
        same = outcomes[0].columns[name].tobytes() if outcomes else b""
        for outcome in outcomes[1:]:  # bytes are compared in a tenth of the time of arrays
            if outcome.columns[name].tobytes() != same:
                raise ValueError(f"{outcome.attack} and {outcomes[0].attack} saw other images")
    if not outcomes:
        return np.zeros((0, 0), dtype=np.bool_)
    return np.stack([outcome.success(pred) for outcome in outcomes])


def group_by_threat(outcomes: Iterable[Outcome]) -> dict[Threat, list[Outcome]]:
    """Outcomes that may be compared: by norm, radius and goal, in order of appearance."""
    found: dict[Threat, list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.threat, []).append(outcome)
    return found


def nearest_distance(outcomes: Sequence[Outcome]) -> Distance:
    """How far the nearest success on each broken image is, in the norm of the shared threat.

    nan without a success, or if the norm is none that is measured.
    """
    return average(find_nearest(outcomes)[find_breaks(outcomes).any(0)])


def average(found: np.ndarray[Any, Any]) -> Distance:
    """Median and mean of distances; nan of none."""
    return Distance(median(found), mean(found))


def find_nearest(outcomes: Sequence[Outcome]) -> np.ndarray[Any, Any]:
    """How far the nearest success on each image ``(n,)`` is, in the norm of the shared threat.

    inf without a success, nan if the norm is none that is measured.
    """
    far = np.stack([perturbation_sizes(outcome) for outcome in outcomes])
    return np.asarray(np.where(find_breaks(outcomes), far, np.inf).min(0))


def find_nearest_attack(outcomes: Sequence[Outcome]) -> np.ndarray[Any, Any]:
    """Which of these attacks ``(n,)`` has the nearest success on each image; 0 where none has."""
    broken = find_breaks(outcomes)
    far = np.stack([perturbation_sizes(outcome) for outcome in outcomes])
    # a success whose distance nobody measures is one all the same
    known = np.where(np.isfinite(far), far, np.finfo(np.float64).max)
    return np.asarray(np.where(broken, known, np.inf).argmin(0))


def robustness_curve(outcomes: Sequence[Outcome], points: int = 200) -> Curve:
    """How many images hold out within each distance, against attacks of one norm and goal.

    Falls at the distance of the nearest success of each image, and ends at the largest radius
    that was tried or, of attacks without one, at the farthest success. Evaluated at `points`
    distances at most, the first and the last among them.
    """
    far = np.full(len(outcomes[0].attacked), np.inf)
    end = 0.0
    for outcome, broken in zip(outcomes, find_breaks(outcomes), strict=True):
        # a hair outside the ball, where rounding in float32 may have led, is at its radius
        limit = math.inf if outcome.threat.eps is None else outcome.threat.eps
        found = np.clip(perturbation_sizes(outcome)[broken], 0.0, limit)
        far[broken] = np.fmin(far[broken], found)
        last = found[np.isfinite(found)].max(initial=0.0)
        end = max(end, last if outcome.threat.eps is None else limit)
    fallen = np.sort(far[np.isfinite(far)])
    budgets = np.unique([0.0, *fallen, end])
    kept = np.unique(np.linspace(0, len(budgets) - 1, points).round().astype(int))
    robust = int(outcomes[0].attacked.sum()) - np.searchsorted(fallen, budgets[kept], "right")
    return Curve(budgets[kept], robust)


def perturbation_sizes(outcome: Outcome) -> np.ndarray[Any, Any]:
    """How far each image ``(n,)`` went in the norm of its threat; 1 - SSIM for norm `ssim`.

    nan if the norm is none that is measured.
    """
    norm, c = outcome.threat.norm, outcome.columns
    if norm == "ssim":
        return np.asarray(1 - c["ssim"])
    return c[norm] if norm in NORMS else np.full(len(c["id"]), math.nan)


def summarize_distances(*outcomes: Outcome) -> Distances:
    """How far successes went, in every measure; nan without a success.

    Of several attacks of one threat, the success on each image that is nearest in its norm.
    """
    best, made = find_nearest_attack(outcomes), find_breaks(outcomes).any(0)
    rows = np.flatnonzero(made)

    def take_nearest(name: str) -> np.ndarray[Any, Any]:
        values = np.stack([outcome.columns[name] for outcome in outcomes])
        return np.asarray(values[best[rows], rows])

    return average_distances(take_nearest)


def average_distances(take: Callable[[str], np.ndarray[Any, Any]]) -> Distances:
    """Medians of the norms and means of the similarities of what `take` gives by their names."""
    norms = {name: median(take(name)) for name in NORMS}
    return Distances(**norms, ssim=mean(take("ssim")), psnr=mean(take("psnr")))


def find_fooled(outcome: Outcome) -> Flags:
    """The attacked images ``(n,)`` on which the goal is reached, alarms left aside."""
    silent = {name: column for name, column in outcome.columns.items() if name != "flagged"}
    return replace(outcome, columns=silent).success()


def detection_rate(outcome: Outcome) -> Rate:
    """Results that a detector flags, of those that reach the attack's goal: true positives."""
    return rate(outcome.columns["flagged"][find_fooled(outcome)])


def false_alarm_rate(defended: Defended) -> Rate:
    """Images as they are that a detector flags, of all: false positives."""
    return rate(defended.clean["flagged"])


def compare_column(one: Outcome, other: Outcome, name: str) -> Difference:
    """A column of two attacks, on the images on which both reach their goals.

    ValueError for attacks on different images.
    """
    first, second = find_breaks([one, other])
    return paired_difference(one.columns[name], other.columns[name], first & second)


def sum_costs(outcomes: Sequence[Outcome]) -> Cost:
    """Mean passes per attacked image and seconds, summed over attacks."""
    each = [outcome.columns for outcome in outcomes]
    return Cost(
        forwards=sum(mean(c["forwards"][c["attacked"]]) for c in each),
        backwards=sum(mean(c["backwards"][c["attacked"]]) for c in each),
        seconds=sum(float(c["seconds"].sum()) for c in each),
    )


def count_faults(outcome: Outcome) -> Faults:
    """What had to be repaired or counted against the model."""
    c = outcome.columns
    box, ball, pixels = (int((c["fault"] & bit != 0).sum()) for bit in (1, 2, 4))
    return Faults(box, ball, pixels, int((outcome.attacked & (c["pred_adv"] == -1)).sum()))
