"""`refine`: what is left of another attack, verified, smaller, and of its changes alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from toys import late

from robusteval.models.classifier import Classifier, predict_classes
from robusteval.models.steps import count_passes
from robusteval.registry import ATTACKS, parse
from robusteval.runs.types import Threat
from robusteval.search.balls import measure_distances, quantise

if TYPE_CHECKING:
    from robusteval.attacks.pgd import pgd
    from robusteval.attacks.refine import refine
else:
    pgd = late("robusteval.attacks.pgd", "pgd")
    refine = late("robusteval.attacks.refine", "refine")

SEEDS = torch.arange(8)


def images() -> Tensor:
    return quantise(torch.rand(8, 3, 12, 12, generator=torch.Generator().manual_seed(0)))


def classes_of(model: Classifier, x: Tensor) -> Tensor:
    with torch.no_grad():
        return predict_classes(model(x))


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(
    ("guide", "where"), [("grad", "both"), ("gradcam", "label"), ("change", "both")]
)
def test_what_is_kept_still_fools_and_is_the_attacks_own(
    bands: Classifier, guide: str, where: Any, targeted: bool
) -> None:
    x = images()
    y = classes_of(bands, x)
    goal = (y + 1) % 3 if targeted else y
    given: dict[str, Any] = {"targeted": targeted, "seeds": SEEDS, "eps": 0.1}

    plain = pgd(bands, x, goal, steps=20, **given)
    made = refine(bands, x, goal, attack="pgd+steps=20", guide=guide, where=where, **given)

    hit = (classes_of(bands, plain) == goal) == targeted
    assert hit.sum() >= 6
    assert torch.equal((classes_of(bands, made) == goal) == targeted, hit)
    assert bool(((made == plain) | (made == x)).all())
    assert torch.equal(quantise(made), made)
    assert torch.equal(made[~hit], plain[~hit])
    before, after = (measure_distances(z, x) for z in (plain, made))
    assert (after["l0"] <= before["l0"]).all()
    assert (after["l0"][hit] < before["l0"][hit]).any()
    again = refine(
        bands, x[3:5], goal[3:5], attack="pgd+steps=20", guide=guide, where=where,
        **{**given, "seeds": SEEDS[3:5]},
    )  # fmt: skip
    assert torch.equal(again, made[3:5])


def test_it_costs_a_forward_pass_a_halving_and_nothing_for_failures(bands: Classifier) -> None:
    x = images()
    y = classes_of(bands, x)
    passes = {}
    for steps in (0, 7):
        with count_passes(bands, 8, x.device) as counted:
            made = refine(
                bands, x, y, seeds=SEEDS, eps=0.05, attack="pgd", guide="change", steps=steps
            )
        passes[steps] = counted.forwards

    fooled = classes_of(bands, made) != y
    assert torch.equal(passes[7] - passes[0], 7.0 * fooled.to(passes[7]))


def test_the_threat_is_that_of_the_attack() -> None:
    entry = ATTACKS.entry("refine")
    spec = ATTACKS.check_spec(parse("refine:attack=pgd,norm=l2,eps=0.5"))
    assert entry.threat(spec) == Threat("l2", 0.5, False)
    spec = ATTACKS.check_spec(parse("refine:attack=sigma_zero,norm=none"))
    assert entry.threat(spec) == Threat("none", None, False)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"attack": "refine"}, "attack must be one of"),
        ({"attack": "sigma_zero"}, "any with norm=none"),
        ({"attack": "pgd", "norm": "none"}, "pgd has a radius: give norm=linf"),
        ({"attack": "fmn"}, "fmn has no radius: give norm=none"),
        ({"attack": "pgd+eps=3"}, "without norm, eps"),
        ({"attack": "pgd+steps"}, r"NAME\+key=value"),
        ({"attack": "pgd+stepz=3"}, "unknown parameter of pgd 'stepz'"),
        ({"guide": "gradcan"}, "unknown interpreter"),
        ({"steps": -1}, "steps must be 0 or more"),
        ({"guide": "change", "where": "label"}, "where does nothing unless guide is not change"),
        ({"guide": "change", "where": "reached"}, "where does nothing unless guide is not change"),
    ],
)
def test_odd_settings_are_refused(bands: Classifier, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        refine(bands, torch.empty(0, 3, 12, 12), torch.empty(0, dtype=torch.int64), **settings)
