"""How long attacks will take: passes that are known beforehand, and what is made of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robusteval.evaluation import estimate
from robusteval.evaluation.plan import prepare_attack
from robusteval.models.classifier import Classifier
from robusteval.progress import write_estimate
from robusteval.registry import ATTACKS, parse


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("pgd:steps=20", 41),
        ("pgd:steps=20,restarts=3", 123),
        ("apgd:steps=10,restarts=2,targets=2", 84),
        ("square:queries=700", 700),
        ("standard", 600),
        ("standard:norm=l0,eps=3", 1060),
        ("quick:norm=l0,eps=3", 170),
        ("unmask:layers=conv1,draws=20", 2 * 20 * 310),
        ("unmask:company=15", 16 * 310),
        ("noise", None),
        ("isi", None),
    ],
)
def test_passes_of_an_image_that_holds_are_known(
    bands: Classifier, text: str, passes: int | None
) -> None:
    """From the parameters, or from what was counted; None where nobody knows."""
    attack = prepare_attack(ATTACKS.check_spec(parse(text)), bands, (3, 12, 12))

    assert estimate.count_expected(attack) == passes


def test_seconds_are_those_of_passes(bands: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second for 2 images forward and back: a quarter for each pass of each image.

    The shortest of some rounds counts, unless the first says already that nobody asks.
    """
    taken: list[float] = []

    def time_passes(_model: object, _x: Tensor) -> float:
        taken.append(1.0 if taken else 3.0)
        return taken[-1]

    monkeypatch.setattr(estimate, "time_passes", time_passes)
    monkeypatch.setattr(estimate, "WORTH_SAYING", 60.0)
    attacks = [
        prepare_attack(ATTACKS.check_spec(parse(text)), bands, (3, 12, 12))
        for text in ("pgd:steps=20", "square:queries=59")
    ]
    x = torch.rand(2, 3, 12, 12)

    assert estimate.estimate_seconds(bands, x, attacks, 8) == pytest.approx(100 * 8 / 4)
    assert len(taken) == estimate.ROUNDS
    assert estimate.estimate_seconds(bands, x[:0], attacks, 8) is None
    taken.clear()
    assert estimate.estimate_seconds(bands, x, attacks[:1], 1) == pytest.approx(3 * 41 / 4)
    assert len(taken) == 1


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (6, "less than a minute"),
        (61, "about 1 minute"),
        (1800, "about 30 minutes"),
        (3 * 3600, "about 3 hours"),
        (72 * 3600, "about 3 days"),
    ],
)
def test_a_duration_is_said_as_people_say_it(seconds: float, words: str) -> None:
    """Not to the second."""
    assert write_estimate(seconds) == words
