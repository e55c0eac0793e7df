"""Each image at the smallest setting that fools it, by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from robusteval.analysis.papers.declaration import Reading
from robusteval.analysis.papers.results import MissingError, Results
from robusteval.analysis.papers.smallest_settings import take_smallest
from robusteval.runs.types import Outcome, Run, Spec

MakeOutcome = Callable[..., Outcome]
MakeRun = Callable[..., Run]
KEYS = ("eps", "eps2")


@pytest.fixture
def settings(make_outcome: MakeOutcome) -> list[Outcome]:
    """Four images: one falls at once, one to .2 of either attack, one to .4, one to none."""
    rows = [
        ("fgsm", 0.4, [1, 1, 0, 0], 0.6),
        ("pgd", 0.2, [1, 1, 0, 0], 0.9),
        ("fgsm", 0.2, [0, 1, 0, 0], 0.95),
        ("pgd", 0.1, [1, 0, 0, 0], 0.99),
        ("pgd", 0.4, [1, 1, 1, 0], 0.7),
    ]
    return [
        replace(
            make_outcome(
                [bool(each) for each in fooled], spec=Spec(name, {"eps": eps}), ssim=[likeness] * 4
            ),
            resolved={"eps": eps, "steps": 3},
        )
        for name, eps, fooled, likeness in rows
    ]


def test_the_smallest_setting_is_taken_and_of_equal_ones_the_likest(
    settings: list[Outcome],
) -> None:
    found = take_smallest(settings, KEYS)

    assert found.columns["smallest"].tolist() == [0.1, 0.2, 0.4, np.inf]
    assert found.columns["ssim"].tolist() == pytest.approx([0.99, 0.95, 0.7, 0.6])
    assert found.success().tolist() == [True, True, True, False]
    assert str(found.attack) == "the smallest eps of 5 settings of fgsm and pgd, 0.1 to 0.4"


def test_figures_are_read_there(settings: list[Outcome], make_run: MakeRun) -> None:
    """A median has no end where half of the images have none."""
    run = make_run(*settings)
    attacks = {
        "all": tuple(str(outcome.attack) for outcome in settings),
        "fgsm": tuple(str(outcome.attack) for outcome in settings if outcome.attack.name == "fgsm"),
    }
    results = Results(run, attacks, {})

    def read(attack: str, measure: str) -> float:
        return results.measure(Reading(attack, measure, smallest=KEYS))[1].value

    assert read("all", "smallest") == pytest.approx(0.3)
    assert read("all", "fooled") == 0.75
    assert read("all", "ssim_lost") == pytest.approx((0.01 + 0.05 + 0.3) / 3)
    with pytest.raises(MissingError, match="a median has no end"):
        read("fgsm", "smallest")


def test_settings_that_cannot_be_ordered_are_no_figure(
    settings: list[Outcome], make_run: MakeRun
) -> None:
    run = make_run(*settings)
    results = Results(run, {"all": tuple(str(outcome.attack) for outcome in settings)}, {})

    with pytest.raises(MissingError, match="not all settings have eps2 or radius"):
        results.measure(Reading("all", "smallest", smallest=("eps2", "radius")))


def test_other_images_are_not_mixed(settings: list[Outcome]) -> None:
    one, other = settings[:2]
    moved = replace(other, columns={**other.columns, "id": other.columns["id"][::-1]})

    with pytest.raises(ValueError, match="the same images"):
        take_smallest([one, moved], KEYS)


def test_no_level_mixes_them_with_settings_of_all_images(
    settings: list[Outcome], make_run: MakeRun
) -> None:
    """A stronger setting by lot would not be each image at its smallest."""
    texts = tuple(str(outcome.attack) for outcome in settings)
    results = Results(make_run(*settings), {"all": texts}, {})

    point = results.choose_point(Reading("all", "fooled", {"ssim": 0.7}, smallest=KEYS))

    assert (point.beyond, point.why) == (None, "")
    assert point.kept.attack.name.startswith("the smallest eps")
