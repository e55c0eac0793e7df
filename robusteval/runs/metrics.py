"""Numbers from columns: pure functions, NumPy only, every empty case decided.

A rate over no images has no value (nan) and the interval (0, 1); a distance over no successes is
nan; a cost per image over no attacked images is nan.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from robusteval.runs.types import Defended, Flags, Outcome, Threat

NORMS = ("l0", "l0_pixels", "l1", "l2", "linf")
HALF = 0.5  # an image: the continuity correction of the test of a drop


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


class Curve(NamedTuple):
    """How many images hold out at rising distances."""

    budgets: np.ndarray[Any, Any]  # (m,) float64, rising from 0
    robust: np.ndarray[Any, Any]  # (m,) int, falling


class Mean(NamedTuple):
    """A mean over images with its 95 % interval (Student's t); nan where it has none."""

    value: float
    low: float
    high: float
    n: int  # images it is over


class Difference(NamedTuple):
    """A mean of paired differences with its 95 % interval, and a test of their sign."""

    value: float
    low: float
    high: float
    n: int
    less: int  # images on which the first is below the second
    more: int
    p: float  # of the exact two-sided sign test; 1 if nothing differs


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


class Pairs(NamedTuple):
    """Verdicts on the same images before and after a change."""

    lost: int  # held before, not after
    gained: int  # the other way round
    n: int  # all images, those without a change too

    @property
    def drop(self) -> float:
        """By how much the share fell; nan of no images."""
        return (self.lost - self.gained) / self.n if self.n else math.nan

    @property
    def interval(self) -> Interval:
        """Score interval of the drop at 95 % (Tango 1998); (-1, 1) of no images."""
        z = NormalDist().inv_cdf(0.975)
        if not self.n:
            return Interval(-1.0, 1.0)
        return Interval(margin_at(self, z), margin_at(self, -z))


def paired(before: Flags, after: Flags) -> Pairs:
    """The pairs of two masks ``(n,)`` over the same images in the same order."""
    return Pairs(int((before & ~after).sum()), int((after & ~before).sum()), len(before))


def drop_test(pairs: Pairs, margin: float = 0.0) -> float:
    """Probability of such a drop, or a larger one, if the true one is `margin`. One-sided.

    The larger of the p-values of Tango's score test of a drop beyond the margin and of the exact
    sign test of any drop at all (McNemar's), so that it is never bolder than the latter. The score
    test is an approximation; with half an image as continuity correction its level at the margin
    is at most 5.4 % where 5 % are asked for (enumerated: 50 to 10,000 images, margins of 1 to 5
    points, up to 20 % of them discordant), without it up to 9 %.

    Parameters
    ----------
    pairs : Pairs
        What changed.
    margin : float
        The drop that is allowed, in [0, 1).
    """
    z = float(tango(pairs.lost, pairs.gained, pairs.n, margin, HALF)) if pairs.n else 0.0
    return max(NormalDist().cdf(-z), sign_test(pairs.lost, pairs.gained))


def tango(
    lost: Any, gained: Any, n: int, margin: float, correction: float = 0.0
) -> np.ndarray[Any, Any]:
    """By how many standard errors a paired drop exceeds `margin`: Tango's score statistic.

    Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design, Statistics in Medicine 17 (1998) 891. The variance is that of the most
    likely distribution whose drop is exactly the margin.

    Parameters
    ----------
    lost, gained : int or ndarray
        Discordant images either way, broadcast against each other.
    n : int
        All images, at least 1.
    margin : float
        In [-1, 1].
    correction : float
        Images that are taken off the drop, for continuity.
    """
    if margin < 0:
        return -tango(gained, lost, n, -margin, -correction)
    b, c = np.asarray(lost, dtype=np.float64), np.asarray(gained, dtype=np.float64)
    # the share of gains q maximises the likelihood: 2n q^2 + linear q - c margin (1 - margin) = 0
    linear = (2 * n - b + c) * margin - (b + c)
    q = (np.sqrt(linear**2 + 8 * n * c * margin * (1 - margin)) - linear) / (4 * n)
    variance = n * (2 * q + margin * (1 - margin))
    excess = b - c - n * margin - correction
    with np.errstate(divide="ignore", invalid="ignore"):
        z = excess / np.sqrt(variance)
    return np.where(np.isnan(z), 0.0, z)  # no variance and nothing beyond the margin


def margin_at(pairs: Pairs, z: float) -> float:
    """The margin at which Tango's statistic is `z`: an end of the score interval."""
    low, high = -1.0, 1.0  # the statistic falls from one to the other
    while high - low > 1e-9:
        middle = (low + high) / 2
        above = tango(pairs.lost, pairs.gained, pairs.n, middle) > z
        low, high = (middle, high) if above else (low, middle)
    return (low + high) / 2


def holm(values: Sequence[float]) -> list[float]:
    """p-values such that, of several tests, any false alarm is as rare as the level says.

    Holm's step-down correction (Scandinavian Journal of Statistics 6 (1979) 65), in the order
    given; it holds however the tests depend on each other.
    """
    adjusted = [1.0] * len(values)
    highest = 0.0
    for rank, i in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        highest = max(highest, min(1.0, (len(values) - rank) * values[i]))
        adjusted[i] = highest
    return adjusted


def at_most(k: int, n: int, share: float) -> float:
    """Probability of at most `k` of `n` if each comes with probability `share`. Exact."""
    return min(1.0, float(binomial(np.arange(k + 1), np.asarray(n), share).sum()))


def detectable_drop(
    n: int, discordant: float, *, alpha: float = 0.05, margin: float = 0.0, power: float = 0.8
) -> float:
    """The smallest true drop that `drop_test` finds with probability `power`. Exact to 1e-4.

    Parameters
    ----------
    n : int
        Images.
    discordant : float
        Share of images whose verdict changes anyhow, half of them either way; in [0, 1).
    alpha : float
        Level of the test, in (0, 0.5].
    margin : float
        The drop that is allowed, in [0, 1).
    power : float
        In (0, 1).

    Returns
    -------
    float
        At least `margin`; inf if not even a drop of everything else would be found.
    """
    if n == 0:
        return math.inf
    half = discordant / 2
    gained = likely(n, half)  # (c,)
    weights = binomial(gained, np.asarray(n), half)
    needed = losses_needed(gained, n, alpha, margin)

    def found(drop: float) -> float:
        around = likely(n, half + drop)
        lost = np.arange(max(around[0], needed.min()), around[-1] + 1)  # (b,)
        p = min((half + drop) / (1 - half), 1.0)  # of those that were not gained
        chances = binomial(lost, (n - gained)[:, None], p)  # (c, b)
        return float(weights @ np.where(lost >= needed[:, None], chances, 0.0).sum(1))

    low, high, most = margin, margin + 4 / n, 1 - discordant
    while high < most and found(high) < power:
        low, high = high, 2 * high - margin
    high = min(high, most)
    if high <= low or found(high) < power:
        return math.inf
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if found(middle) >= power else (middle, high)
    return high


def losses_needed(
    gained: np.ndarray[Any, Any], n: int, alpha: float, margin: float
) -> np.ndarray[Any, Any]:
    """Fewest losses beside each number of gains ``(c,)`` at which `drop_test` is below alpha.

    More than `n` where there are too few images for it.
    """
    # sign test: so many tails of a fair coin before head number gained + 1; by Hoeffding's
    # inequality this many are always enough
    most = 2 * int(gained.max()) + math.ceil(6 * math.log(1 / alpha)) + 1
    k = np.arange(most)
    tails = 1 - np.cumsum(binomial(k, k + gained[:, None], 0.5) / 2, axis=1)  # P(more than k)
    by_sign = 1 + (tails < alpha).argmax(1)

    z = NormalDist().inv_cdf(1 - alpha)
    low, high = np.zeros_like(gained), n - gained + 1  # found from here on, at the latest
    while (high - low > 1).any():
        middle = (low + high) // 2
        beyond = tango(middle, gained, n, margin, HALF) > z
        low, high = np.where(beyond, low, middle), np.where(beyond, middle, high)
    needed = np.maximum(by_sign, high)
    return np.where(needed > n - gained, n + 1, needed)


def likely(n: int, p: float) -> np.ndarray[Any, Any]:
    """The numbers of `n` that come up when each does with probability p, but for 1e-5."""
    spread = 4.5 * math.sqrt(n * p * (1 - p)) + 8
    return np.arange(max(0, math.floor(n * p - spread)), min(n, math.ceil(n * p + spread)) + 1)


def binomial(k: np.ndarray[Any, Any], n: np.ndarray[Any, Any], p: float) -> np.ndarray[Any, Any]:
    """Probabilities of exactly `k` of `n`, broadcast; 0 where k is above n."""
    logs = np.zeros(int(n.max()) + 1)
    np.cumsum(np.log(np.arange(1, len(logs))), out=logs[1:])  # of factorials
    inside = k <= n
    some, rest = np.where(inside, k, 0), np.where(inside, n - k, 0)
    p = min(max(p, 1e-300), 1 - 1e-16)
    chance = logs[some + rest] - logs[some] - logs[rest] + some * math.log(p)
    return np.where(inside, np.exp(chance + rest * math.log1p(-p)), 0.0)


def accuracy(clean: Mapping[str, np.ndarray[Any, Any]]) -> Rate:
    """Images classified correctly, of all; logits that are not finite are never right.

    Behind a detector, an image that is flagged is not right either.
    """
    return rate(right(clean)) if clean else Rate(0, 0)


def right(clean: Mapping[str, np.ndarray[Any, Any]]) -> Flags:
    """The images ``(n,)`` that are classified correctly and raise no alarm."""
    hit: Flags = (clean["pred_clean"] == clean["label"]) & (clean["pred_clean"] >= 0)
    return hit & ~clean["flagged"] if "flagged" in clean else hit


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
    broken = breaks(outcomes)
    far = np.stack([sizes(outcome) for outcome in outcomes])
    found = np.where(broken, far, np.inf).min(0)[broken.any(0)]
    return Distance(median(found), mean(found))


def curve(outcomes: Sequence[Outcome], points: int = 200) -> Curve:
    """How many images hold out within each distance, against attacks of one norm and goal.

    Falls at the distance of the nearest success of each image, and ends at the largest radius
    that was tried or, of attacks without one, at the farthest success. Evaluated at `points`
    distances at most, the first and the last among them.
    """
    far = np.full(len(outcomes[0].attacked), np.inf)
    end = 0.0
    for outcome, broken in zip(outcomes, breaks(outcomes), strict=True):
        # a hair outside the ball, where rounding in float32 may have led, is at its radius
        limit = math.inf if outcome.threat.eps is None else outcome.threat.eps
        found = np.clip(sizes(outcome)[broken], 0.0, limit)
        far[broken] = np.fmin(far[broken], found)
        last = found[np.isfinite(found)].max(initial=0.0)
        end = max(end, last if outcome.threat.eps is None else limit)
    fallen = np.sort(far[np.isfinite(far)])
    budgets = np.unique([0.0, *fallen, end])
    kept = np.unique(np.linspace(0, len(budgets) - 1, points).round().astype(int))
    robust = int(outcomes[0].attacked.sum()) - np.searchsorted(fallen, budgets[kept], "right")
    return Curve(budgets[kept], robust)


def sizes(outcome: Outcome) -> np.ndarray[Any, Any]:
    """How far each image ``(n,)`` went in the norm of its threat; 1 - SSIM for norm `ssim`.

    nan if the norm is none that is measured.
    """
    norm, c = outcome.threat.norm, outcome.columns
    if norm == "ssim":
        return np.asarray(1 - c["ssim"])
    return c[norm] if norm in NORMS else np.full(len(c["id"]), math.nan)


def distances(*outcomes: Outcome) -> Distances:
    """How far successes went, in every measure; nan without a success.

    Of several attacks of one threat, the success on each image that is nearest in its norm.
    """
    broken = breaks(outcomes)
    far = np.stack([sizes(outcome) for outcome in outcomes])
    best = np.where(broken, far, np.inf).argmin(0)
    made = broken.any(0)

    def found(name: str) -> np.ndarray[Any, Any]:
        values = np.stack([outcome.columns[name] for outcome in outcomes])
        return np.asarray(values[best[made], np.flatnonzero(made)])

    norms = {name: median(found(name)) for name in NORMS}
    return Distances(**norms, ssim=mean(found("ssim")), psnr=mean(found("psnr")))


def fooled(outcome: Outcome) -> Flags:
    """The attacked images ``(n,)`` on which the goal is reached, alarms left aside."""
    silent = {name: column for name, column in outcome.columns.items() if name != "flagged"}
    return replace(outcome, columns=silent).success()


def detected(outcome: Outcome) -> Rate:
    """Results that a detector flags, of those that reach the attack's goal: true positives."""
    return rate(outcome.columns["flagged"][fooled(outcome)])


def false_alarms(defended: Defended) -> Rate:
    """Images as they are that a detector flags, of all: false positives."""
    return rate(defended.clean["flagged"])


def auc(negatives: np.ndarray[Any, Any], positives: np.ndarray[Any, Any]) -> float:
    """Probability that a score of `positives` is above one of `negatives`, ties counting half.

    The area under the ROC curve (Mann and Whitney 1947); nan if either is empty.
    """
    if not (len(negatives) and len(positives)):
        return math.nan
    ordered = np.sort(negatives)
    below = np.searchsorted(ordered, positives, "left") + np.searchsorted(
        ordered, positives, "right"
    )
    return float(below.mean() / (2 * len(ordered)))


def roc(
    negatives: np.ndarray[Any, Any], positives: np.ndarray[Any, Any], points: int = 100
) -> np.ndarray[Any, Any]:
    """False and true positive rates ``(m, 2)`` from (0, 0) to (1, 1), `points` at most.

    One row per threshold, of which more than `points` are thinned evenly; empty ``(0, 2)`` if
    either kind of scores is.
    """
    if not (len(negatives) and len(positives)):
        return np.zeros((0, 2))
    thresholds = np.unique(np.concatenate([negatives, positives]))
    # how many of each are below a threshold; below the lowest, none
    missed = [np.searchsorted(np.sort(s), thresholds, "right") for s in (negatives, positives)]
    rates = [np.append(1 - count[::-1] / count[-1], 1.0) for count in missed]
    kept = np.unique(np.linspace(0, len(thresholds), points).round().astype(int))
    return np.asarray(np.stack(rates, axis=1)[kept])


def median(values: np.ndarray[Any, Any]) -> float:
    """The median; nan of nothing."""
    return float(np.median(values)) if len(values) else math.nan


def mean(values: np.ndarray[Any, Any]) -> float:
    """The mean; nan of nothing."""
    return float(np.mean(values)) if len(values) else math.nan


def mean_of(values: np.ndarray[Any, Any]) -> Mean:
    """The mean of those values ``(n,)`` that are finite."""
    known = values[np.isfinite(values)]
    n, value = len(known), mean(known)
    if n < 2:
        return Mean(value, math.nan, math.nan, n)
    half = student(n - 1) * float(known.std(ddof=1)) / math.sqrt(n)
    return Mean(value, value - half, value + half, n)


def student(degrees: int) -> float:
    """The 97.5 % quantile of Student's t, within 0.2 %.

    For more than two degrees of freedom by four terms of its expansion around the normal one
    (Abramowitz and Stegun, 26.7.5).
    """
    if degrees <= 2:
        return (12.7062, 4.3027)[degrees - 1]
    z: float = NormalDist().inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / degrees ** (i + 1) for i, term in enumerate(terms))


def difference(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any], among: Flags) -> Difference:
    """How far values ``(n,)`` of the same images are apart, the first less the second."""
    with np.errstate(invalid="ignore"):
        gap = (one - other)[among]
    less, more = int((gap < 0).sum()), int((gap > 0).sum())
    p = min(1.0, 2 * sign_test(max(less, more), min(less, more)))
    return Difference(*mean_of(gap), less, more, p)


def compared(one: Outcome, other: Outcome, name: str) -> Difference:
    """A column of two attacks, on the images on which both reach their goals.

    ValueError for attacks on different images.
    """
    first, second = breaks([one, other])
    return difference(one.columns[name], other.columns[name], first & second)


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
