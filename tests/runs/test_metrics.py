"""Numbers from columns, against closed forms, SciPy, and counting by hand."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robusteval.runs import metrics
from robusteval.runs.statistics import Rate
from robusteval.runs.types import Defended, Outcome, Spec, Threat

Make = Callable[..., Outcome]
ONLY_FIRST, ONLY_SECOND = [True, False, False, False], [False, True, False, False]


def test_accuracy_counts_all_images() -> None:
    clean = {"label": np.array([0, 1, 2, 3]), "pred_clean": np.array([0, 1, 0, -1])}

    assert metrics.accuracy(clean) == Rate(2, 4)


def test_logits_that_are_not_finite_are_never_right() -> None:
    clean = {"label": np.array([-1]), "pred_clean": np.array([-1])}

    assert metrics.accuracy(clean) == Rate(0, 1)


def test_accuracy_of_nothing_is_empty() -> None:
    assert metrics.accuracy({}) == Rate(0, 0)


def test_images_that_were_wrong_are_neither_robust_nor_successes(make_outcome: Make) -> None:
    outcome = make_outcome([True, True, False, False], right=[True, False, True, False])

    assert metrics.robust_accuracy(outcome) == Rate(1, 4)
    assert metrics.success_rate(outcome) == Rate(1, 2)


def test_non_finite_logits_under_attack_are_not_robust(make_outcome: Make) -> None:
    outcome = make_outcome([False, False], pred_adv=np.array([-1, 1]))

    assert metrics.robust_accuracy(outcome) == Rate(1, 2)
    assert metrics.count_faults(outcome).logits_not_finite == 1


def test_each_column_judges_by_itself(make_outcome: Make) -> None:
    outcome = make_outcome([True, True], pred_8bit=np.array([0, 2]), pred_png=np.array([0, 1]))

    judged = [metrics.robust_accuracy(outcome, f"pred_{way}").k for way in ("adv", "8bit", "png")]

    assert judged == [0, 1, 2]


def test_a_targeted_attack_succeeds_only_on_its_target(make_outcome: Make) -> None:
    outcome = make_outcome(
        [True, True],
        threat=Threat("linf", 8 / 255, True),
        target=np.array([1, 5]),
    )

    assert metrics.success_rate(outcome) == Rate(1, 2)


def test_worst_case_is_robust_only_where_all_are(make_outcome: Make) -> None:
    outcomes = [make_outcome(ONLY_FIRST), make_outcome(ONLY_SECOND)]

    assert metrics.worst_case(outcomes) == Rate(2, 4)


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_worst_case_is_never_better_than_one_attack(masks: list[list[bool]]) -> None:
    outcomes = [plain_outcome(mask) for mask in masks]

    worst = metrics.worst_case(outcomes)

    assert worst.k <= min(metrics.robust_accuracy(outcome).k for outcome in outcomes)
    assert 5 - worst.k >= sum(metrics.unique_breaks(outcomes))


def plain_outcome(broken: list[bool]) -> Outcome:
    """Only the columns that verdicts need; property tests cannot use fixtures."""
    n = len(broken)
    columns = {
        "id": np.arange(n),
        "label": np.zeros(n, np.int64),
        "attacked": np.ones(n, np.bool_),
        "pred_adv": np.array(broken, np.int64),
    }
    return Outcome(Spec("pgd", {}), Threat("linf", 0.1, False), "white-box", columns)


def test_other_images_cannot_be_joined(make_outcome: Make) -> None:
    other = make_outcome(ONLY_FIRST)
    other.columns["id"] = other.columns["id"][::-1]

    with pytest.raises(ValueError, match="saw other images"):
        metrics.worst_case([make_outcome(ONLY_FIRST), other])


def test_the_worst_case_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no attacks"):
        metrics.worst_case([])


def test_unique_breaks_are_those_of_no_other(make_outcome: Make) -> None:
    outcomes = [
        make_outcome([True, True, False, False]),
        make_outcome([False, True, True, True]),
        make_outcome([False, True, False, False]),
    ]

    assert metrics.unique_breaks(outcomes) == [1, 2, 0]
    assert metrics.unique_breaks(outcomes[:1]) == [2]
    assert metrics.unique_breaks([]) == []


def test_groups_keep_threats_apart_in_order(make_outcome: Make) -> None:
    threats = [Threat("l2", 0.5, False), Threat("linf", 0.1, False), Threat("l2", 0.5, True)]
    outcomes = [make_outcome(ONLY_FIRST, threat=threats[i]) for i in (0, 1, 0, 2)]

    grouped = metrics.group_by_threat(outcomes)

    assert list(grouped) == threats
    assert [len(group) for group in grouped.values()] == [2, 1, 1]


def test_distance_is_of_successes_in_the_norm_of_the_threat(make_outcome: Make) -> None:
    outcome = make_outcome(
        [True, True, True, False],
        threat=Threat("l2", None, False),
        l2=np.array([1.0, 2.0, 6.0, 100.0]),
    )

    assert metrics.nearest_distance([outcome]) == (2.0, 3.0)


def test_the_nearest_success_counts(make_outcome: Make) -> None:
    far = make_outcome([True, True], linf=np.array([4.0, 4.0]))
    near = make_outcome([True, False], linf=np.array([1.0, 0.0]))

    assert metrics.nearest_distance([far, near]) == (2.5, 2.5)


def test_no_success_has_no_distance(make_outcome: Make) -> None:
    outcome = make_outcome([False, False])

    assert all(map(math.isnan, metrics.nearest_distance([outcome])))
    assert all(map(math.isnan, metrics.summarize_distances(outcome)))


def test_a_norm_that_is_not_measured_has_no_distance(make_outcome: Make) -> None:
    outcome = make_outcome([True], threat=Threat("none", 0.1, False))

    assert all(map(math.isnan, metrics.nearest_distance([outcome])))


def test_distances_summarise_successes(make_outcome: Make) -> None:
    outcome = make_outcome(
        [True, True, True, False],
        l0=np.array([1.0, 2.0, 9.0, 99.0]),
        ssim=np.array([0.5, 0.5, 0.8, 1.0]),
        psnr=np.array([10.0, 20.0, 30.0, np.inf]),
    )

    summary = metrics.summarize_distances(outcome)

    assert (summary.l0, summary.ssim, summary.psnr) == pytest.approx((2.0, 0.6, 20.0))


def test_cost_is_per_attacked_image_and_in_total(make_outcome: Make) -> None:
    outcome = make_outcome([True, False, False], right=[True, True, False])

    assert metrics.sum_costs([outcome]) == pytest.approx((20.0, 19.0, 0.04))
    assert metrics.sum_costs([outcome, outcome]) == pytest.approx((40.0, 38.0, 0.08))


def test_cost_of_attacking_nothing_is_unknown_per_image(make_outcome: Make) -> None:
    cost = metrics.sum_costs([make_outcome([False], right=[False])])

    assert math.isnan(cost.forwards)
    assert math.isnan(cost.backwards)
    assert cost.seconds == 0.0


def test_faults_are_counted_by_bit(make_outcome: Make) -> None:
    outcome = make_outcome([False] * 4, fault=np.array([0, 1, 3, 6], dtype=np.uint8))

    assert metrics.count_faults(outcome) == (2, 2, 1, 0)


def test_no_image_at_all_is_no_error(make_outcome: Make) -> None:
    outcome = make_outcome([])

    assert metrics.worst_case([outcome]) == Rate(0, 0)
    assert metrics.success_rate(outcome) == Rate(0, 0)
    assert math.isnan(metrics.nearest_distance([outcome]).median)
    assert metrics.count_faults(outcome) == (0, 0, 0, 0)


def test_what_reads_runs_imports_neither_torch_nor_art() -> None:
    code = (
        "import sys, robusteval.runs.folder, robusteval.runs.metrics, robusteval.registry\n"
        "from robusteval.reports import markdown, record, terminal\n"
        "print(sorted({'torch', 'art', 'scipy', 'sklearn'} & sys.modules.keys()))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"


def test_a_detector_is_judged_by_the_results_that_fool_the_model(make_outcome: Make) -> None:
    flagged = np.array([True, True, False, True, False])
    right = [True, True, True, True, False]
    outcome = make_outcome([True, True, True, False, True], right=right, flagged=flagged)

    assert metrics.find_fooled(outcome).tolist() == [True, True, True, False, False]
    assert metrics.detection_rate(outcome) == Rate(2, 3)
    assert metrics.success_rate(outcome) == Rate(1, 4)
    assert metrics.robust_accuracy(outcome) == Rate(3, 5)


def test_a_flagged_clean_image_is_a_false_alarm_and_not_right() -> None:
    clean = {
        "label": np.array([0, 1, 2, 3]),
        "pred_clean": np.array([0, 1, 9, -1]),
        "flagged": np.array([True, False, True, False]),
    }

    assert metrics.find_right(clean).tolist() == [False, True, False, False]
    assert metrics.accuracy(clean) == Rate(1, 4)
    assert metrics.false_alarm_rate(Defended(Spec("d", {}), "detector", clean, {})) == Rate(2, 4)


def test_a_curve_falls_where_the_nearest_success_is(make_outcome: Make) -> None:
    threat = Threat("l2", None, False)
    first = make_outcome(
        [True, True, False, False],
        right=[True, True, True, False],
        threat=threat,
        l2=np.array([0.5, 0.2, 9.0, 9.0]),
    )
    second = make_outcome(
        [True, False, False, False],
        right=[True, True, True, False],
        threat=threat,
        l2=np.array([0.1, 9.0, 9.0, 9.0]),
    )

    curve = metrics.robustness_curve([first, second])

    assert curve.budgets.tolist() == [0.0, 0.1, 0.2, 0.5]
    assert curve.robust.tolist() == [3, 2, 1, 1]


def test_a_curve_ends_at_the_largest_radius(make_outcome: Make) -> None:
    far = np.array([0.1, 0.3 + 1e-9, 0.0])
    outcome = make_outcome([True, True, False], threat=Threat("linf", 0.3, False), linf=far)

    curve = metrics.robustness_curve([outcome])

    assert curve.budgets.tolist() == [0.0, 0.1, 0.3]
    assert curve.robust.tolist() == [3, 2, 1]


def test_a_distance_that_is_not_known_does_not_move_a_curve(make_outcome: Make) -> None:
    ssim = np.array([np.nan, 0.75])
    outcome = make_outcome([True, True], threat=Threat("ssim", None, False), ssim=ssim)

    curve = metrics.robustness_curve([outcome])

    assert curve.budgets.tolist() == [0.0, 0.25]
    assert curve.robust.tolist() == [2, 1]


def test_a_long_curve_is_thinned_and_stays_exact(make_outcome: Make) -> None:
    far = np.random.default_rng(0).random(3000)
    outcome = make_outcome([True] * 3000, threat=Threat("l2", None, False), l2=far)

    curve = metrics.robustness_curve([outcome])

    assert len(curve.budgets) == 200
    assert curve.budgets[-1] == far.max()
    assert curve.robust.tolist() == [(far > budget).sum() for budget in curve.budgets]


def test_distances_of_several_attacks_are_those_of_the_nearest_success(make_outcome: Make) -> None:
    threat = Threat("l2", 1.0, False)
    near = np.array([0.1, 0.9, 0.1])
    mid = np.full(3, 0.4)
    first = make_outcome([True, True, False], threat=threat, l2=near, linf=near, ssim=near)
    second = make_outcome([True, True, False], threat=threat, l2=mid, linf=2 * mid, ssim=mid)

    found = metrics.summarize_distances(first, second)

    assert found.l2 == pytest.approx(0.25)
    assert found.linf == pytest.approx(0.45)
    assert found.ssim == pytest.approx(0.25)


def test_paired_differences_are_of_images_on_which_both_succeed(
    make_outcome: Callable[..., Outcome],
) -> None:
    one = make_outcome([True, True, True, False], far=np.array([1.0, 2.0, 3.0, 0.0]))
    other = make_outcome([True, True, False, True], far=np.array([2.0, 2.0, 0.0, 9.0]))

    found = metrics.compare_column(one, other, "far")

    assert (found.value, found.n, found.less, found.more, found.p) == (-0.5, 2, 1, 0, 1.0)
