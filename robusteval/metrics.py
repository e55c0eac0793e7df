"""Numbers from columns: pure functions, NumPy only, every empty case decided.

A rate over no images has no value (nan) and the interval (0, 1); a distance over no successes is
nan; a cost per image over no attacked images is nan.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from robusteval.records import Flags, Outcome, Threat

NORMS = ("l0", "l0_pixels", "l1", "l2", "linf")


class Interval(NamedTuple):
    """Both ends of a confidence interval."""

    low: float
    high: float


class Rate(NamedTuple):
    """`k` of `n` images."""

    k: int
    n: int

    @property
    def value(self) -> float:
        """The share, in [0, 1]; nan of no images."""
        return self.k / self.n if self.n else math.nan

    @property
    def interval(self) -> Interval:
        """Wilson interval at 95 %."""
        return wilson(self.k, self.n)


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


def wilson(k: int, n: int, confidence: float = 0.95) -> Interval:
    """Score interval of a proportion (Wilson 1927), without continuity correction.

    Parameters
    ----------
    k, n : int
        Successes and trials, ``0 <= k <= n``.
    confidence : float
        Coverage, in (0, 1).

    Returns
    -------
    Interval
        (0, 1) for no trials.
    """
    if not 0 <= k <= n:
        raise ValueError(f"{k} of {n} is no proportion")
    if n == 0:
        return Interval(0.0, 1.0)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p, scale = k / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    # at the ends the formula gives 0 and 1 up to rounding
    return Interval(centre - half if k else 0.0, centre + half if k < n else 1.0)


def sign_test(wins: int, losses: int) -> float:
    """Probability of at least so many wins if each were a fair coin; ties are left out before.

    Exact, one-sided; 1 if there is nothing to compare.
    """
    n = wins + losses
    ways, total = 1, 0
    for i in range(losses + 1):
        total += ways
        ways = ways * (n - i) // (i + 1)
    return float(total / 2**n)


def accuracy(clean: Mapping[str, np.ndarray[Any, Any]]) -> Rate:
    """Images classified correctly, of all; logits that are not finite are never right."""
    if not clean:
        return Rate(0, 0)
    right = (clean["pred_clean"] == clean["label"]) & (clean["pred_clean"] >= 0)
    return rate(right)


def rate(mask: Flags) -> Rate:
    """How many are true, of all."""
    return Rate(int(mask.sum()), len(mask))


def robust_accuracy(outcome: Outcome, pred: str = "pred_adv") -> Rate:
    """Images right at first and still after the attack, of all images of the cell."""
    return worst_case([outcome], pred)


def success_rate(outcome: Outcome, pred: str = "pred_adv") -> Rate:
    """Images on which the attack reached its goal, of those attacked."""
    return rate(outcome.success(pred)[outcome.attacked])


def worst_case(outcomes: Sequence[Outcome], pred: str = "pred_adv") -> Rate:
    """Images right at first and after every one of these attacks, of all.

    ValueError for no attacks, or attacks on different images.
    """
    if not outcomes:
        raise ValueError("the worst case of no attacks")
    broken = breaks(outcomes, pred).any(0)
    return rate(outcomes[0].attacked & ~broken)


def unique_breaks(outcomes: Sequence[Outcome], pred: str = "pred_adv") -> list[int]:
    """For each attack, on how many images it alone succeeds: its marginal gain.

    ValueError for attacks on different images.
    """
    broken = breaks(outcomes, pred)
    alone = broken & (broken.sum(0) == 1)
    return [int(row.sum()) for row in alone]


def breaks(outcomes: Sequence[Outcome], pred: str = "pred_adv") -> Flags:
    """Successes ``(attacks, n)``; ValueError if the images are not the same in each row."""
    for outcome in outcomes[1:]:
        for name in ("id", "attacked"):
            if not np.array_equal(outcome.columns[name], outcomes[0].columns[name]):
                raise ValueError(f"{outcome.attack} and {outcomes[0].attack} saw other images")
    if not outcomes:
        return np.zeros((0, 0), dtype=np.bool_)
    return np.stack([outcome.success(pred) for outcome in outcomes])


def groups(outcomes: Iterable[Outcome]) -> dict[Threat, list[Outcome]]:
    """Outcomes that may be compared: by norm, radius and goal, in order of appearance."""
    found: dict[Threat, list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.threat, []).append(outcome)
    return found


def nearest(outcomes: Sequence[Outcome]) -> Distance:
    """How far the nearest success on each broken image is, in the norm of the shared threat.

    nan without a success, or if the norm is none that is measured.
    """
    norm = outcomes[0].threat.norm
    if norm not in NORMS:
        return Distance(math.nan, math.nan)
    sizes = np.stack([outcome.columns[norm] for outcome in outcomes])
    broken = breaks(outcomes)
    found = np.where(broken, sizes, np.inf).min(0)[broken.any(0)]
    return Distance(median(found), mean(found))


def distances(outcome: Outcome) -> Distances:
    """How far the successes of one attack went, in every measure; nan without a success."""
    c, made = outcome.columns, outcome.success()
    norms = {name: median(c[name][made]) for name in NORMS}
    return Distances(**norms, ssim=mean(c["ssim"][made]), psnr=mean(c["psnr"][made]))


def median(values: np.ndarray[Any, Any]) -> float:
    """The median; nan of nothing."""
    return float(np.median(values)) if len(values) else math.nan


def mean(values: np.ndarray[Any, Any]) -> float:
    """The mean; nan of nothing."""
    return float(np.mean(values)) if len(values) else math.nan


def cost(outcomes: Sequence[Outcome]) -> Cost:
    """What these attacks cost together."""
    each = [outcome.columns for outcome in outcomes]
    return Cost(
        forwards=sum(mean(c["forwards"][c["attacked"]]) for c in each),
        backwards=sum(mean(c["backwards"][c["attacked"]]) for c in each),
        seconds=sum(float(c["seconds"].sum()) for c in each),
    )


def faults(outcome: Outcome) -> Faults:
    """What had to be repaired or counted against the model."""
    c = outcome.columns
    box, ball, pixels = (int((c["fault"] & bit != 0).sum()) for bit in (1, 2, 4))
    return Faults(box, ball, pixels, int((outcome.attacked & (c["pred_adv"] == -1)).sum()))
