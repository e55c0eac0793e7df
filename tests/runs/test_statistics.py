"""Statistics: closed forms, SciPy's likelihood, exact enumeration, then chance itself."""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats
from sklearn.metrics import roc_curve

from robusteval.runs import statistics
from robusteval.runs.statistics import Interval, Pairs, Rate

COUNTS = [(15, 5, 100), (0, 7, 60), (9, 0, 60), (40, 25, 1000), (1, 1, 2), (3, 2, 5)]


def test_pairs_are_counted_by_hand() -> None:
    before = np.array([True, True, True, False, False, True])
    after = np.array([True, False, False, True, False, True])

    assert statistics.count_pairs(before, after) == Pairs(lost=2, gained=1, n=6)
    assert Pairs(2, 1, 6).drop == pytest.approx(1 / 6)
    assert math.isnan(Pairs(0, 0, 0).drop)


def test_without_a_margin_the_statistic_is_mcnemars() -> None:
    for lost, gained in ((15, 5), (3, 9), (1, 0)):
        expected = (lost - gained) / math.sqrt(lost + gained)

        assert float(statistics.tango(lost, gained, 100, 0.0)) == pytest.approx(expected)


@pytest.mark.parametrize(("lost", "gained", "n"), COUNTS)
@pytest.mark.parametrize("margin", [-0.2, -0.01, 0.01, 0.05, 0.3])
def test_the_variance_is_that_of_the_likeliest_shares(
    lost: int, gained: int, n: int, margin: float
) -> None:
    def unlikelihood(q: float) -> float:
        p, rest = q + margin, 1 - 2 * q - margin
        counts = ((lost, p), (gained, q), (n - lost - gained, rest))
        return -sum(k * math.log(max(share, 1e-300)) for k, share in counts if k)

    best = optimize.minimize_scalar(
        unlikelihood,
        bounds=(max(0.0, -margin), (1 - margin) / 2),
        method="bounded",
        options={"xatol": 1e-12},
    )
    variance = n * (2 * best.x + margin - margin**2)
    expected = (lost - gained - n * margin) / math.sqrt(variance)

    assert float(statistics.tango(lost, gained, n, margin)) == pytest.approx(expected, rel=1e-4)


def test_a_published_example_of_the_score_interval() -> None:
    """1 and 7 of 21 pairs: Fagerland, Lydersen and Laake, Statistics in Medicine 33 (2014) 2850."""
    assert Pairs(1, 7, 21).interval == pytest.approx((-0.517, -0.026), abs=5e-4)


def test_nothing_lost_is_wilsons_interval() -> None:
    """With b = c = 0 the score equation is that of a share of zero."""
    n = 100
    end = statistics.wilson(0, n).high

    assert Pairs(0, 0, n).interval == pytest.approx((-end, end), abs=1e-8)
    assert Pairs(0, 0, 0).interval == Interval(-1.0, 1.0)


@pytest.mark.parametrize(("lost", "gained", "n"), COUNTS)
def test_the_interval_holds_the_margins_that_are_not_refuted(
    lost: int, gained: int, n: int
) -> None:
    low, high = Pairs(lost, gained, n).interval
    z = NormalDist().inv_cdf(0.975)

    assert low <= (lost - gained) / n <= high
    assert float(statistics.tango(lost, gained, n, low)) == pytest.approx(z, abs=1e-6)
    assert float(statistics.tango(lost, gained, n, high)) == pytest.approx(-z, abs=1e-6)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 200), st.floats(0, 0.2))
def test_a_drop_is_never_claimed_more_boldly_than_by_exact_mcnemar(
    lost: int, gained: int, same: int, margin: float
) -> None:
    p = statistics.drop_test(Pairs(lost, gained, lost + gained + same), margin)
    exact = stats.binomtest(lost, lost + gained, alternative="greater").pvalue if lost else 1.0

    assert exact - 1e-12 <= p <= 1


def test_a_drop_beyond_the_margin_is_rarer_the_larger_it_is() -> None:
    values = [statistics.drop_test(Pairs(lost, 10, 1000), 0.01) for lost in range(10, 80)]

    assert values == sorted(values, reverse=True)
    assert values[0] == 1.0 or values[0] > 0.5
    assert values[-1] < 1e-5


def test_statsmodels_agrees_on_exact_mcnemar() -> None:
    tables = pytest.importorskip(
        "statsmodels.stats.contingency_tables",
        exc_type=ImportError,
        reason="statsmodels is a second opinion only",
    )
    for lost, gained in ((12, 3), (5, 5), (9, 0)):
        both = float(tables.mcnemar([[50, lost], [gained, 20]], exact=True).pvalue)

        assert min(1.0, 2 * statistics.sign_test(lost, gained)) == pytest.approx(both)


def test_holm_by_hand() -> None:
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.5, 0.6]) == [1.0, 1.0]
    assert statistics.holm([0.02]) == [0.02]
    assert statistics.holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_the_values_and_bonferroni(values: list[float]) -> None:
    adjusted = statistics.holm(values)

    for value, made in zip(values, adjusted, strict=True):
        assert value <= made <= min(1.0, len(values) * value) or made == pytest.approx(value)
    assert sorted(adjusted) == [made for _, made in sorted(zip(values, adjusted, strict=True))]


@given(st.integers(0, 400), st.integers(0, 400), st.floats(0, 1))
def test_at_most_is_the_binomial_distribution(k: int, extra: int, share: float) -> None:
    n = max(1, k + extra)

    assert statistics.at_most(k, n, share) == pytest.approx(
        float(stats.binom.cdf(k, n, share)), rel=1e-8, abs=1e-12
    )


def power(n: int, discordant: float, drop: float, alpha: float, margin: float) -> float:
    """How often a true drop is found, by going through all counts."""
    half, total = discordant / 2, 0.0
    for lost in range(n + 1):
        for gained in range(n - lost + 1):
            if statistics.drop_test(Pairs(lost, gained, n), margin) < alpha:
                shares = [half + drop, half, 1 - discordant - drop]
                counts = [lost, gained, n - lost - gained]
                total += float(stats.multinomial.pmf(counts, n, shares))
    return total


@pytest.mark.parametrize(
    ("discordant", "alpha", "margin"), [(0.0, 0.05, 0.0), (0.1, 0.05, 0.02), (0.2, 0.01, 0.0)]
)
def test_a_detectable_drop_is_found_with_the_power_it_states(
    discordant: float, alpha: float, margin: float
) -> None:
    n = 40
    drop = statistics.detectable_drop(n, discordant, alpha=alpha, margin=margin)

    assert power(n, discordant, drop, alpha, margin) == pytest.approx(0.8, abs=2e-3)


@pytest.mark.parametrize(
    ("n", "discordant", "expected"),
    [
        (200, 0.0, 0.034),
        (200, 0.02, 0.048),
        (1000, 0.0, 0.008),
        (1000, 0.02, 0.016),
        (1000, 0.06, 0.024),
        (10_000, 0.0, 0.002),
        (10_000, 0.02, 0.004),
    ],
)
def test_detectable_drops_of_exact_mcnemar(n: int, discordant: float, expected: float) -> None:
    """Computed on a grid of 0.2 points with another program: the next point of it at or above."""
    drop = statistics.detectable_drop(n, discordant)

    assert math.ceil(drop * 500 - 0.05) / 500 == pytest.approx(expected)


def test_larger_samples_show_smaller_drops() -> None:
    shown = [
        statistics.detectable_drop(n, 0.02, margin=0.01) for n in (100, 300, 1000, 3000, 10_000)
    ]

    assert shown == sorted(shown, reverse=True)
    assert all(drop > 0.01 for drop in shown)


def test_too_few_images_show_nothing() -> None:
    assert statistics.detectable_drop(0, 0.0) == math.inf
    assert statistics.detectable_drop(4, 0.0) == math.inf  # all lost is 1 / 16, no less than alpha
    assert statistics.detectable_drop(5, 0.0) < 1


def simulated(
    rng: np.random.Generator, n: int, flips: float, drop: float, times: int
) -> list[Pairs]:
    """Comparisons in which so many verdicts flip, half either way, and some are lost on top."""
    half = flips / 2
    shares = [half + drop, half, 1 - flips - drop]
    return [
        Pairs(int(lost), int(gained), n) for lost, gained, _ in rng.multinomial(n, shares, times)
    ]


@pytest.mark.parametrize("flips", [0.0, 0.005, 0.02, 0.06])
@pytest.mark.parametrize("n", [100, 300, 1000])
def test_a_drop_of_exactly_the_margin_seldom_fails(n: int, flips: float) -> None:
    """The level of the test at the edge of what is allowed, over 4,000 comparisons each."""
    rng = np.random.default_rng(1)
    values = [statistics.drop_test(pairs, 0.01) for pairs in simulated(rng, n, flips, 0.01, 4000)]

    share = float(np.mean(np.array(values) < 0.05))

    assert share <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 4000)


def test_the_interval_covers_the_true_drop() -> None:
    rng = np.random.default_rng(2)
    drops = itertools.chain.from_iterable(
        ((drop, pairs) for pairs in simulated(rng, 300, 0.06, drop, 200))
        for drop in (0.0, 0.02, 0.1)
    )

    covered = [pairs.interval.low <= drop <= pairs.interval.high for drop, pairs in drops]

    assert 0.92 <= np.mean(covered) <= 0.98


@given(st.integers(0, 300), st.integers(0, 300), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_is_scipys(k: int, extra: int, confidence: float) -> None:
    n = k + extra
    if n == 0:
        return
    theirs = stats.binomtest(k, n).proportion_ci(confidence, method="wilson")

    ours = statistics.wilson(k, n, confidence)

    assert ours == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert 0 <= ours.low <= k / n <= ours.high <= 1


def test_wilson_knows_nothing_from_nothing() -> None:
    assert statistics.wilson(0, 0) == Interval(0.0, 1.0)


@pytest.mark.parametrize(("k", "n"), [(-1, 2), (3, 2), (0, -1)])
def test_wilson_refuses_what_is_no_proportion(k: int, n: int) -> None:
    with pytest.raises(ValueError, match="no proportion"):
        statistics.wilson(k, n)


def test_wilson_ends_are_exact() -> None:
    assert statistics.wilson(0, 7).low == 0.0
    assert statistics.wilson(7, 7).high == 1.0


def test_a_rate_of_nothing_has_no_value() -> None:
    assert math.isnan(Rate(0, 0).value)
    assert Rate(0, 0).interval == (0.0, 1.0)
    assert Rate(1, 4).value == 0.25


@given(st.integers(0, 200), st.integers(0, 200))
def test_sign_test_is_the_binomial_test(wins: int, losses: int) -> None:
    n = wins + losses
    expected = stats.binomtest(wins, n, alternative="greater").pvalue if n else 1.0

    assert statistics.sign_test(wins, losses) == pytest.approx(expected, rel=1e-9)


def test_sign_test_by_hand() -> None:
    assert statistics.sign_test(0, 0) == 1.0
    assert statistics.sign_test(3, 0) == 1 / 8
    assert statistics.sign_test(2, 1) == 4 / 8


def test_sign_test_of_many_images_is_no_overflow() -> None:
    assert statistics.sign_test(5000, 5000) == pytest.approx(0.504, abs=1e-3)
    assert statistics.sign_test(10_000, 0) == 0.0


SCORES = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=30)


@given(SCORES, SCORES)
def test_auc_is_the_share_of_pairs_in_order(negatives: list[float], positives: list[float]) -> None:
    pairs = [(p > n) + (p == n) / 2 for p in positives for n in negatives]

    assert statistics.roc_auc(np.array(negatives), np.array(positives)) == pytest.approx(
        sum(pairs) / len(pairs)
    )


@given(SCORES, SCORES)
def test_roc_is_scikit_learns(negatives: list[float], positives: list[float]) -> None:
    labels = [0] * len(negatives) + [1] * len(positives)
    fpr, tpr, _ = roc_curve(labels, negatives + positives, drop_intermediate=False)

    ours = statistics.roc_curve(np.array(negatives), np.array(positives))

    np.testing.assert_allclose(ours, np.stack([fpr, tpr], axis=1), atol=1e-12)
    assert np.trapezoid(ours[:, 1], ours[:, 0]) == pytest.approx(
        statistics.roc_auc(np.array(negatives), np.array(positives))
    )


def test_a_long_roc_is_thinned_between_its_ends() -> None:
    rng = np.random.default_rng(0)

    ours = statistics.roc_curve(rng.normal(0, 1, 5000), rng.normal(1, 1, 5000))

    assert len(ours) == 100
    assert ours[0].tolist() == [0, 0]
    assert ours[-1].tolist() == [1, 1]
    assert (np.diff(ours, axis=0) >= 0).all()


def test_nothing_can_be_told_apart_from_nothing() -> None:
    some, none = np.ones(3), np.zeros(0)

    assert math.isnan(statistics.roc_auc(some, none))
    assert math.isnan(statistics.roc_auc(none, some))
    assert statistics.roc_curve(some, none).shape == (0, 2)


def test_the_interval_of_a_mean_is_students() -> None:
    """Against tables, and SciPy."""
    values = np.array([0.1, 0.4, np.nan, 0.2, np.inf, 0.7])

    mean = statistics.mean_interval(values)

    assert mean.n == 4
    assert mean.value == pytest.approx(0.35)
    low, high = stats.t.interval(0.95, 3, 0.35, stats.sem([0.1, 0.4, 0.2, 0.7]))
    assert (mean.low, mean.high) == pytest.approx((low, high), rel=1e-12)


def test_few_values_have_no_interval() -> None:
    one, none = statistics.mean_interval(np.array([0.3])), statistics.mean_interval(np.zeros(0))

    assert (one.value, one.n) == (0.3, 1)
    assert np.isnan([one.low, one.high, none.value, none.low, none.high]).all()


def test_the_sign_test_of_a_difference_is_two_sided() -> None:
    values = np.arange(1.0, 9.0)
    everywhere = np.ones(8, np.bool_)

    assert statistics.paired_difference(values, 2 * values, everywhere).p == 2 / 2**8
    assert statistics.paired_difference(2 * values, values, everywhere).p == 2 / 2**8
    assert statistics.paired_difference(values, values, everywhere).p == 1.0
