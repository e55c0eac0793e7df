"""Figures beside a run, compared image by image: numbers that can be checked by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from robusteval.analysis.papers.comparison import check_claim
from robusteval.analysis.papers.declaration import Claim, Reading
from robusteval.analysis.papers.on_maps import MapAttack, find_on_maps
from robusteval.analysis.papers.paired import OfImages, compare_images
from robusteval.analysis.papers.results import Results
from robusteval.runs.explanation_record import (
    ExplanationRecord,
    FocusFigures,
    ImageCount,
    MapHeight,
    MeanOfImages,
    UnitFigures,
)
from robusteval.runs.statistics import mean_interval, paired_interval
from robusteval.runs.types import Run, Values

MakeRun = Callable[..., Run]
MEAN = MeanOfImages(0.5, 0.4, 0.6, 8)
SCORES = (0.50, 0.52, 0.54, 0.56, 0.58, 0.60, 0.62, np.nan)
UNITS = UnitFigures(None, "drawn", 9, 0.4, 0.1, 0.6, 0.1, 0.3, 0.05, 0.5, 3, 30, ())


def explained(
    *, elsewhere: Sequence[float] = SCORES, first: int = 0, units: UnitFigures | None = UNITS
) -> ExplanationRecord:
    """An attack on eight images, the last of which it does not fool, by one map."""
    focus = FocusFigures(
        *("cam", "clean, label", MEAN, MEAN, MEAN, MEAN, MEAN, ImageCount(3, 7)),
        scores=SCORES,
        chances=(0.45,) * 7 + (np.nan,),
        elsewheres=tuple(elsewhere),
        shifts=SCORES,
    )
    heights = (
        MapHeight("cam", "clean, label", MEAN, (1.0,) * 8),
        MapHeight("cam", "adversarial, label", MEAN, (0.8, 0.7) * 4),
    )
    images = [SimpleNamespace(id=f"{first + i:016x}") for i in range(8)]
    record = SimpleNamespace(
        attack="pgd", focus=(focus,), heights=heights, images=images, units=units
    )
    return cast(ExplanationRecord, record)


def check(results: Results, more: str, than: str, **other: Any) -> Any:
    """A claim of one attack by two measures."""
    claim = Claim("It does.", "here", Reading("one", more), Reading("one", than, **other))
    return check_claim(claim, results)


def test_scores_are_compared_image_by_image(make_run: MakeRun) -> None:
    """With Student's interval of the differences; an image that is not fooled does not count."""
    results = Results(make_run(), {}, {}, {"one": explained()})

    found = check(results, "focus:cam", "focus_chance:cam")
    by_hand = mean_interval(np.array(SCORES[:7]) - 0.45)
    assert found.holding == "holds"
    assert found.measured[:3] == pytest.approx((0.11, by_hand.low, by_hand.high))
    assert found.measured.n == 7
    assert found.said.endswith("interpretability score less what noise would score, pgd")

    worse = explained(elsewhere=[0.7 + 0.03 * (i % 2) for i in range(8)])
    results = replace(results, explanations={"one": worse})
    assert check(results, "focus:cam", "focus_elsewhere:cam").holding == "does not hold"
    mixed = explained(elsewhere=[0.4, 0.7] * 4)
    results = replace(results, explanations={"one": mixed})
    assert check(results, "focus:cam", "focus_elsewhere:cam").holding == "not decided"


def test_heights_are_compared_image_by_image(make_run: MakeRun) -> None:
    results = Results(make_run(), {}, {}, {"one": explained()})

    found = check(results, "height:cam:clean:label", "height:cam:adversarial:label")

    assert found.measured.value == pytest.approx(0.25)
    assert "map of the label before less height of the map of the label after" in found.said


@pytest.mark.parametrize(
    ("more", "than", "reason"),
    [
        ("focus:cam", "focus:gradcam", "no map of this network"),
        ("focus:cam", "promotion", "not known of single images"),
        ("focus:cam", "l2", "l2 is not of the images that focus:cam is of"),
    ],
)
def test_what_cannot_be_compared_says_why(
    make_run: MakeRun, more: str, than: str, reason: str
) -> None:
    record = explained()
    record.regions = SimpleNamespace(types={"promotion": MEAN})  # type: ignore[misc, assignment]
    found = check(Results(make_run(), {}, {}, {"one": record}), more, than)

    assert found.holding == "not measured"
    assert reason in found.said


def test_two_attacks_are_compared_on_the_images_of_both(make_run: MakeRun) -> None:
    """Found by their content; of no image in common there is nothing."""
    claim = Claim("More.", "here", Reading("one", "focus:cam"), Reading("two", "focus:cam"))
    results = Results(make_run(), {}, {}, {"one": explained(), "two": explained(first=3)})

    found = check_claim(claim, results)
    assert found.measured is not None
    # of images 3 to 6 the second scores what the first does three images before
    assert found.measured[:1] + found.measured[3:] == pytest.approx((0.06, 4))

    apart = replace(results, explanations={"one": explained(), "two": explained(first=8)})
    assert check_claim(claim, apart).said == "both were not measured on the same images"


def led(tau: Values, *, kept: Sequence[bool] | None = None, first: int = 0) -> MapAttack:
    """An attack on the maps of some images."""
    n = len(tau)
    ids = np.arange(first, first + n, dtype=np.uint64)
    return MapAttack("led", ids, tau, np.array(kept or [True] * n))


def test_attacks_on_maps_are_compared_over_the_images_that_both_have_right(
    make_run: MakeRun,
) -> None:
    """Each network has others right; of those that stay right those that do so with both."""
    plain = led(np.linspace(0, 0.9, 10), kept=[True] * 9 + [False])
    hard = led(np.linspace(0.4, 1.2, 9), kept=[False] + [True] * 8, first=2)
    results = Results(
        make_run(),
        {},
        {},
        hardened=make_run(),
        on_maps={"one": plain},
        on_hardened_maps={"one": hard},
    )

    def compare(measure: str) -> Any:
        more = Reading("one", measure, hardened=True)
        return check_claim(Claim("More.", "here", more, Reading("one", measure)), results)

    everyone = compare("tau_all")
    assert everyone.measured.value == pytest.approx(0.2)
    assert everyone.measured.n == 8  # images 2 to 9
    assert everyone.holding == "holds"
    assert everyone.said.endswith("led on the hardened network less led")
    assert compare("tau_kept").measured.n == 6  # without the first and the last of these
    kept = compare("label_kept").measured
    assert (kept.value, kept.n) == (0, 8)

    alone = replace(results, hardened=None, on_hardened_maps={})
    results = alone
    assert "--hardened" in compare("tau_all").said


def test_the_interval_of_a_rank_correlation_has_ends() -> None:
    """Student's knows of none; and of images that are all alike none is told."""
    tau_all, tau_kept = (find_on_maps(name) for name in ("tau_all", "tau_kept"))
    assert tau_all is not None
    assert tau_kept is not None
    few = led(np.array([-0.9, 0.9, 0.9]), kept=[False, True, True])

    whole, kept = tau_all.read(few), tau_kept.read(few)

    assert (whole.low, whole.high, whole.n) == (-1, 1, 3)
    assert kept.value == pytest.approx(0.9)
    assert np.isnan((kept.low, kept.high)).all()


def test_a_difference_that_does_not_vary_has_no_interval(make_run: MakeRun) -> None:
    same = led(np.linspace(0, 0.9, 4))
    maps = {"on_maps": {"one": same}, "on_hardened_maps": {"one": same}}
    results = Results(make_run(), {}, {}, hardened=make_run(), **maps)  # type: ignore[arg-type]
    more, than = Reading("one", "tau_all", hardened=True), Reading("one", "tau_all")

    found = check_claim(Claim("More.", "here", more, than), results)

    assert found.holding == "not decided"
    assert "0 (no interval; 4 images)" in found.said


@pytest.mark.parametrize(
    ("low", "high", "holding"),
    [(0.05, 0.5, "holds"), (-0.1, 0.5, "not decided"), (-0.5, -0.1, "does not hold")],
)
def test_a_figure_is_above_a_value_where_its_interval_is(
    make_run: MakeRun, low: float, high: float, holding: str
) -> None:
    """Where one that reaches it need not leave it out; what it counts is named."""
    units = replace(UNITS, gain_low=low, gain_high=high)
    results = Results(make_run(), {}, {}, {"one": explained(units=units)})
    claim = Claim("It does.", "here", above=Reading("one", "units_gain"), value=0)

    found = check_claim(claim, results)

    assert found.holding == holding
    assert "30 units), to be above 0" in found.said
    none = replace(results, explanations={"one": explained(units=None)})
    assert check_claim(claim, none).holding == "not measured"


def test_an_image_without_a_share_is_in_no_interval() -> None:
    """It counts in one network alone, so that it is neither lost nor gained."""
    ids = np.arange(4, dtype=np.uint64)
    one = OfImages("", "plain", ids, np.array([1.0, 1.0, 0.0, np.nan]), "share")
    other = OfImages("", "hardened", ids, np.array([0.0, 1.0, 0.0, 0.0]), "share")

    found, _ = compare_images(one, other)

    assert found[:4] == pytest.approx((1 / 3, *paired_interval(1, 0, 3), 3))
