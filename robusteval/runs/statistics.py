"""Intervals, tests and curves of rates, means and scores: pure functions of plain numbers.

Nothing here knows of attacks or columns. SciPy is imported where it is used: reports that need
none of it come without the tenth of a second that it takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from robusteval.runs.types import Flags

HALF = 0.5  # an image: the continuity correction of the test of a drop


class Interval(NamedTuple):
    """Both ends of a confidence interval."""

    low: float
    high: float


NOWHERE = Interval(math.nan, math.nan)


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


@lru_cache(10_000)  # of a run with thousands of cells the same few hundred are asked for
def wilson(k: float, n: float, confidence: float = 0.95) -> Interval:
    """Score interval of a proportion (Wilson 1927), without continuity correction.

    Parameters
    ----------
    k : float
        Successes, ``0 <= k <= n``. Of trials that succeed by lot, each with its own probability,
        the sum of these: no values in [0, 1] vary more about their mean than zeros and ones, so
        that the interval is of their mean, too, and rather too wide.
    n : float
        Trials; fewer than there were where these vary more than by their own chance.
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
        return paired_interval(self.lost, self.gained, self.n)


def count_pairs(before: Flags, after: Flags) -> Pairs:
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
    lost: Any, gained: Any, n: float, margin: float, correction: float = 0.0
) -> np.ndarray[Any, Any]:
    """By how many standard errors a paired drop exceeds `margin`: Tango's score statistic.

    Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design, Statistics in Medicine 17 (1998) 891. The variance is that of the most
    likely distribution whose drop is exactly the margin.

    Parameters
    ----------
    lost, gained : float or ndarray
        Discordant images either way, broadcast against each other.
    n : float
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


def paired_interval(lost: float, gained: float, n: float) -> Interval:
    """Score interval at 95 % of how much more was lost than gained (Tango 1998), as a share.

    `lost` and `gained` may be fractions of images: the sums of positive and of negative differences
    of values in [0, 1]. These vary no more about their mean than pairs of zeros and ones with the
    same sums, so that the interval is of the mean difference, too, and rather too wide. (-1, 1) of
    no images.
    """
    z = NormalDist().inv_cdf(0.975)
    if not n:
        return Interval(-1.0, 1.0)
    return Interval(find_margin(lost, gained, n, z), find_margin(lost, gained, n, -z))


def find_margin(lost: float, gained: float, n: float, z: float) -> float:
    """The margin at which Tango's statistic is `z`: an end of the score interval."""
    low, high = -1.0, 1.0  # the statistic falls from one to the other
    while high - low > 1e-9:
        middle = (low + high) / 2
        above = tango(lost, gained, n, middle) > z
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
    from scipy import special

    return float(special.bdtr(k, n, share))


def fewer_test(k: int, n: int, rest_k: int, rest_n: int) -> float:
    """Probability of at most `k` of `n` where as many are held as in the rest, by chance alone.

    Fisher's exact test, one-sided: the tail of the hypergeometric distribution whose margins are
    those of a group of `n` images and of the `rest_n` others. 1 where either is empty.
    """
    held, total = k + rest_k, n + rest_n
    factorials = list_log_factorials(total)
    i = np.arange(max(0, n - (total - held)), k + 1)

    def count_ways(some: Any, among: int) -> np.ndarray[Any, Any]:
        ways: np.ndarray[Any, Any] = factorials[among] - factorials[some] - factorials[among - some]
        return ways

    ways = count_ways(i, held) + count_ways(n - i, total - held) - count_ways(n, total)
    return min(1.0, float(np.exp(ways).sum()))


@cache
def list_log_factorials(n: int) -> np.ndarray[Any, Any]:
    """The logarithms of 0! to n! ``(n + 1,)``."""
    return np.cumsum(np.log(np.maximum(np.arange(n + 1), 1)))


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
    gained = likely_counts(n, half)  # (c,)
    weights = binomial(gained, n, half)
    needed = losses_needed(gained, n, alpha, margin)

    def compute_power(drop: float) -> float:
        around = likely_counts(n, half + drop)
        lost = np.arange(max(around[0], needed.min()), around[-1] + 1)  # (b,)
        p = min((half + drop) / (1 - half), 1.0)  # of those that were not gained
        chances = binomial(lost, (n - gained)[:, None], p)  # (c, b)
        return float(weights @ np.where(lost >= needed[:, None], chances, 0.0).sum(1))

    low, high, most = margin, margin + 4 / n, 1 - discordant
    while high < most and compute_power(high) < power:
        low, high = high, 2 * high - margin
    high = min(high, most)
    if high <= low or compute_power(high) < power:
        return math.inf
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if compute_power(middle) >= power else (middle, high)
    return high


def losses_needed(
    gained: np.ndarray[Any, Any], n: int, alpha: float, margin: float
) -> np.ndarray[Any, Any]:
    """Fewest losses beside each number of gains ``(c,)`` at which `drop_test` is below alpha.

    More than `n` where there are too few images for it.
    """
    from scipy import special

    # sign test: so many tails of a fair coin before head number gained + 1; by Hoeffding's
    # inequality this many are always enough
    most = 2 * int(gained.max()) + math.ceil(6 * math.log(1 / alpha)) + 1
    tails = special.betainc(np.arange(1, most + 1), gained[:, None] + 1, 0.5)  # of index + 1
    by_sign = 1 + (tails < alpha).argmax(1)

    z = -NormalDist().inv_cdf(alpha)  # 1 - alpha may be 1
    low, high = np.zeros_like(gained), n - gained + 1  # found from here on, at the latest
    while (high - low > 1).any():
        middle = (low + high) // 2
        beyond = tango(middle, gained, n, margin, HALF) > z
        low, high = np.where(beyond, low, middle), np.where(beyond, middle, high)
    needed = np.maximum(by_sign, high)
    return np.where(needed > n - gained, n + 1, needed)


def likely_counts(n: int, p: float) -> np.ndarray[Any, Any]:
    """The numbers of `n` that come up when each does with probability p, but for 1e-5."""
    spread = 4.5 * math.sqrt(n * p * (1 - p)) + 8
    return np.arange(max(0, math.floor(n * p - spread)), min(n, math.ceil(n * p + spread)) + 1)


def binomial(
    k: np.ndarray[Any, Any], n: np.ndarray[Any, Any] | int, p: float
) -> np.ndarray[Any, Any]:
    """Probabilities of exactly `k` of `n`, broadcast; 0 where k is above n."""
    from scipy import special

    rest = np.maximum(n - k, 0)
    ways = special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(rest + 1)
    chances = np.exp(ways + special.xlogy(k, p) + special.xlog1py(rest, -p))
    return np.where(k <= n, chances, 0.0)


def roc_auc(negatives: np.ndarray[Any, Any], positives: np.ndarray[Any, Any]) -> float:
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


def roc_curve(
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
    """The median; nan of nothing, and where one is nan."""
    ordered, middle = np.sort(values), len(values) // 2
    if not len(values) or np.isnan(ordered[-1]):
        return math.nan
    # as `np.median`, which takes ten times as long for a few values
    return float(ordered[middle] if len(values) % 2 else ordered[middle - 1 : middle + 1].mean())


def median_interval(values: np.ndarray[Any, Any]) -> Interval:
    """Interval of the median of values ``(n,)`` at 95 % or more, by the sign test; nan if too few.

    Its ends are the values of the widest ranks k and n + 1 - k beyond which the median lies with
    a probability of at most 2.5 % on either side, whatever the distribution.
    """
    ordered, n = np.sort(values), len(values)
    below = np.cumsum(binomial(np.arange(n + 1), n, 0.5)) if n else np.ones(1)
    k = int((below <= 0.025).sum())  # so many of the smallest lie outside
    return Interval(float(ordered[k - 1]), float(ordered[n - k])) if k else NOWHERE


def mean(values: np.ndarray[Any, Any]) -> float:
    """The mean; nan of nothing."""
    if not len(values):
        return math.nan
    # what `np.mean` computes, in a quarter of its time
    kind = None if values.dtype.kind == "f" else np.float64
    return float(np.add.reduce(values, dtype=kind) / len(values))


def mean_interval(values: np.ndarray[Any, Any]) -> Mean:
    """The mean of those values ``(n,)`` that are finite."""
    known = values[np.isfinite(values)]
    n, value = len(known), mean(known)
    if n < 2:
        return Mean(value, math.nan, math.nan, n)
    from scipy import special

    half = float(special.stdtrit(n - 1, 0.975)) * float(known.std(ddof=1)) / math.sqrt(n)
    return Mean(value, value - half, value + half, n)


def bounded_mean(values: np.ndarray[Any, Any], span: tuple[float, float]) -> Mean:
    """The same of values that lie in a span, beyond which Student's interval does not reach.

    Values that do not vary say nothing of others: they have no interval.
    """
    found = mean_interval(values)
    if not found.low < found.high:
        return found._replace(low=math.nan, high=math.nan)
    least, most = span
    return found._replace(low=max(found.low, least), high=min(found.high, most))


def paired_difference(
    one: np.ndarray[Any, Any], other: np.ndarray[Any, Any], among: Flags
) -> Difference:
    """How far values ``(n,)`` of the same images are apart, the first less the second."""
    with np.errstate(invalid="ignore"):
        gap = (one - other)[among]
    less, more = int((gap < 0).sum()), int((gap > 0).sum())
    p = min(1.0, 2 * sign_test(max(less, more), min(less, more)))
    return Difference(*mean_interval(gap), less, more, p)
