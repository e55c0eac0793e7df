"""Two settings of an attack that make up a level, by hand; then as often as intervals say."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from robusteval.analysis.papers.comparison import compare_paper
from robusteval.analysis.papers.declaration import Reading, build_paper
from robusteval.analysis.papers.measures import find_measure
from robusteval.analysis.papers.operating_points import OperatingPoint, find_point
from robusteval.analysis.papers.results import Results
from robusteval.runs.statistics import count_pairs, paired_interval, wilson
from robusteval.runs.types import Outcome, Run, Spec

MakeOutcome = Callable[..., Outcome]
MakeRun = Callable[..., Run]
Sweep = Callable[..., list[Outcome]]

AT = {"ssim": 0.9}


@pytest.fixture
def sweep(make_outcome: MakeOutcome) -> Sweep:
    """Settings eps=1, 2, ... by how many of ten images they fool, and their SSIM."""

    def build(*settings: tuple[int, float]) -> list[Outcome]:
        return [
            make_outcome(
                (np.arange(10) < fooled).tolist(),
                spec=Spec("pgd", {"eps": float(i)}),
                ssim=np.full(10, likeness),
            )
            for i, (fooled, likeness) in enumerate(settings, 1)
        ]

    return build


def test_each_image_counts_by_its_chance(sweep: Sweep) -> None:
    """A quarter of the images get the stronger setting: 2 fall anyhow, 4 more in a quarter."""
    weak, strong = sweep((2, 0.95), (6, 0.75))

    point = find_point([weak, strong], weak, "fooled", AT)
    values, counted = point.read(find_measure("fooled"))

    assert point.beyond is strong
    assert point.share == pytest.approx(0.25)
    assert values.tolist() == pytest.approx([1] * 2 + [0.25] * 4 + [0] * 4)
    assert counted.all()
    assert point.summarize(find_measure("fooled")) == pytest.approx((0.3, *wilson(3, 10), 10))
    assert point.describe(AT) == (
        "pgd:eps=1 at a mean SSIM of 0.95, on 25 % of the images by lot eps=2 at 0.75: 0.9 together"
    )


@pytest.mark.parametrize(
    ("settings", "kept", "name", "why"),
    [
        ([(2, 0.95), (2, 0.75)], 0, "fooled", "the next stronger setting gains nothing"),
        ([(6, 0.95), (2, 0.75)], 0, "fooled", "the next stronger setting gains nothing"),
        ([(2, 0.99), (6, 0.95)], 1, "fooled", "no stronger setting was run"),
        ([(2, 0.9), (6, 0.75)], 0, "fooled", ""),  # the level itself
        ([(2, 0.95), (6, 0.75)], 0, "ssim", ""),  # nothing that an attacker wants
        ([(2, 0.95), (6, 0.75)], 0, "robust", ""),
    ],
)
def test_where_nothing_is_gained_a_setting_stands_alone(
    sweep: Sweep, settings: list[tuple[int, float]], kept: int, name: str, why: str
) -> None:
    """With the figure and interval of its own, and the reason."""
    outcomes = sweep(*settings)
    measure = find_measure(name)

    point = find_point(outcomes, outcomes[kept], name, AT)

    assert point == OperatingPoint(outcomes[kept], why=why)
    assert point.summarize(measure) == measure.summarize(outcomes[kept])
    assert point.describe(AT).endswith(f"({why})" if why else f"{settings[kept][1]:g}")


def test_neighbours_are_those_of_the_level_in_whatever_order(
    sweep: Sweep, make_run: MakeRun
) -> None:
    """A mean that falls, rises and falls again: .92 and .88 lie around .9."""
    outcomes = sweep((1, 0.99), (4, 0.88), (2, 0.92), (8, 0.5))
    texts = tuple(str(outcome.attack) for outcome in outcomes)
    results = Results(make_run(*outcomes), {"sweep": texts}, {})

    point = results.choose_point(Reading("sweep", "fooled", AT))

    assert [o and str(o.attack) for o in point[:2]] == ["pgd:eps=3", "pgd:eps=2"]
    assert point.share == pytest.approx(0.5)


def test_a_share_that_is_reached_is_one_of_a_setting(sweep: Sweep, make_run: MakeRun) -> None:
    """No lot makes an attack that fools every image."""
    declared = {
        "title": "On nothing",
        "source": "nowhere",
        "setting": "none",
        "small": {"samples": 4},
        "paper": {"samples": 4},
        "attacks": {"sweep": ["pgd:eps=1", "pgd:eps=2"]},
        "tables": [],
        "claims": [
            {
                "text": "It fools some.",
                "where": "nowhere",
                "reaches": {"attack": "sweep", "measure": "fooled", "at": AT},
                "value": 0.25,
            }
        ],
    }
    paper = build_paper("mine", declared)
    run = make_run(*sweep((2, 0.95), (6, 0.75)))

    (claim,) = compare_paper(paper, "small", Results(run, paper.attacks, {})).claims

    assert claim.measured is not None
    assert claim.measured.value == 0.2
    assert claim.said.endswith("pgd:eps=1 at a mean SSIM of 0.95")


def test_two_attacks_are_compared_image_by_image(sweep: Sweep) -> None:
    """By hand, and of single settings as pairs ever were."""
    weak, strong = sweep((2, 0.95), (6, 0.75))
    (other,) = sweep((4, 0.9))
    measure = find_measure("fooled")
    mixed = find_point([weak, strong], weak, "fooled", AT)

    found = OperatingPoint(other).compare(measure, mixed)
    plain = OperatingPoint(other).compare(measure, OperatingPoint(weak))

    # two images three quarters more, two a quarter less
    assert found.value == pytest.approx(0.1)
    assert (found.more, found.less, found.n) == (2, 2, 10)
    assert found[1:3] == pytest.approx(paired_interval(1.5, 0.5, 10))
    pairs = count_pairs(other.success(), weak.success())
    assert plain[:4] == pytest.approx((pairs.drop, *pairs.interval, 10))


@pytest.mark.parametrize("n", [15, 60])
def test_intervals_of_chances_hold_what_they_say(n: int) -> None:
    """Of two settings by lot and of their difference from a third, in more than 95 of 100 draws."""
    rng, measure, share = np.random.default_rng(0), find_measure("fooled"), 0.3
    ranks = rng.random((400, n))  # how hard an image is for all attacks
    weak, strong, third = (ranks < chance for chance in (0.3, 0.7, 0.5))
    chances = (1 - share) * weak + share * strong
    everything = np.ones(n, np.bool_)

    shares = [measure.summarize_values(row) for row in chances]
    gaps = [
        measure.compare_values(one, other, everything)
        for one, other in zip(third, chances, strict=True)
    ]

    assert np.mean([found.low <= 0.42 <= found.high for found in shares]) >= 0.95
    assert np.mean([found.low <= 0.08 <= found.high for found in gaps]) >= 0.95


@pytest.mark.parametrize("measure", ["fooled", "fooled_all"])
def test_intervals_allow_for_the_share_which_comes_from_the_same_images(
    make_outcome: MakeOutcome, measure: str
) -> None:
    """A few images lose most of the SSIM, so that the share is another in each draw of them."""
    rng, n, read = np.random.default_rng(0), 100, find_measure(measure)

    def draw(count: int) -> tuple[OperatingPoint, OperatingPoint]:
        hardness, lost = rng.random(count), np.exp(rng.standard_normal(count))
        weak, middle, strong = (
            make_outcome(
                (hardness < chance).tolist(),
                spec=Spec("pgd", {"eps": chance}),
                ssim=1 - np.minimum(1, likeness * lost),
            )
            for chance, likeness in ((0.1, 0.03), (0.5, 0.0), (0.9, 0.12))
        )
        outcomes = [weak, strong]
        kept = weak if weak.columns["ssim"].mean() >= 0.9 else strong
        return find_point(outcomes, kept, measure, AT), OperatingPoint(middle)

    true, third = (each.summarize(read).value for each in draw(200_000))
    draws = [draw(n) for _ in range(400)]
    shares = [point.summarize(read) for point, _ in draws]
    gaps = [point.compare(read, other) for point, other in draws]

    assert np.mean([found.low <= true <= found.high for found in shares]) >= 0.93
    assert np.mean([gap.low <= true - third <= gap.high for gap in gaps]) >= 0.93


def test_no_image_that_counts_for_both_is_no_difference(sweep: Sweep) -> None:
    weak, strong = sweep((2, 0.95), (6, 0.75))
    (other,) = sweep((4, 0.9))
    other.columns["attacked"] = np.zeros(10, np.bool_)
    mixed = find_point([weak, strong], weak, "fooled", AT)

    found = mixed.compare(find_measure("fooled"), OperatingPoint(other))

    assert (found.n, found.low, found.high) == (0, -1, 1)
