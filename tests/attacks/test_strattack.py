"""`strattack`: few squares, at the least price, as far as that is known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from toys import Linear, late

from robusteval.models.classifier import Classifier, predict_classes
from robusteval.search.balls import quantise
from robusteval.search.groups import Groups

if TYPE_CHECKING:
    from robusteval.attacks.strattack import strattack
else:
    strattack = late("robusteval.attacks.strattack", "strattack")


def classes_of(model: Classifier, x: Tensor) -> Tensor:
    with torch.no_grad():
        return predict_classes(model(x))


@pytest.mark.parametrize(("tau", "most"), [(0.0, 1.02), (0.5, 1.05), (2.0, 1.05)])
def test_on_a_linear_network_the_price_is_near_the_least(tau: float, most: float) -> None:
    """That of the closed form; with it the same squares change."""
    network = Linear((3, 8, 8), seed=0).requires_grad_(False)
    model = Classifier(network, num_classes=2).eval()
    x = 0.3 + 0.4 * torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y, groups = classes_of(model, x), Groups(2)
    side = (x * network.weight).flatten(1).sum(1) + network.bias
    slope = (2 * side.sign()).view(-1, 1, 1, 1) * network.weight
    expected, _ = groups.solve_linear(slope, 2 * side.abs(), tau, 1.0)
    fits = ((x + expected >= 0) & (x + expected <= 1)).flatten(1).all(1)  # the box left aside
    assert fits.sum() >= 4

    x_adv = strattack(model, x, y, tau=tau, steps=60, images="float")

    assert (classes_of(model, x_adv) != y).all()
    price, least = (groups.price(d, tau, 1.0) for d in (x_adv - x, expected))
    assert (price[fits] <= most * least[fits]).all()
    assert price[fits].median() <= 1.03 * least[fits].median()
    if tau == 2:
        assert 0 < (groups.measure(x_adv - x) > 0).float().mean() < 0.5


def test_a_higher_price_of_squares_changes_fewer(bands: Classifier) -> None:
    x = quantise(torch.rand(6, 3, 12, 12, generator=torch.Generator().manual_seed(0)))
    y = classes_of(bands, x)
    given: dict[str, Any] = {"steps": 25, "rounds": 3}

    found = [
        strattack(bands, x, y, tau=0.0, **given),
        strattack(bands, x, y, tau=3.0, side=3, **given),
    ]

    counts = [(Groups(3).measure(z - x) > 0).flatten(1).sum(1) for z in found]
    assert all((classes_of(bands, z) != y).all() for z in found)
    assert (counts[1] < counts[0]).all()
    for z in found:
        assert torch.equal(quantise(z), z)


def test_limit_mask_and_target_are_kept(bands: Classifier) -> None:
    x = quantise(torch.rand(6, 3, 12, 12, generator=torch.Generator().manual_seed(0)))
    goal = (classes_of(bands, x) + 1) % 3
    mask = torch.ones(12, 12)
    mask[:, :4] = 0

    x_adv = strattack(
        bands, x, goal, targeted=True, limit=0.3, mask=mask, tau=0.5, steps=25, rounds=3
    )

    assert torch.equal(x_adv[..., :4], x[..., :4])
    assert (x_adv - x).abs().max() <= 0.3
    reached = classes_of(bands, x_adv) == goal
    assert reached.sum() >= 4
    assert torch.equal(x_adv[~reached], x[~reached])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"side": 0}, "side must be at least 1"),
        ({"side": 13}, "side must be at most 12, of these images, not 13"),
        ({"steps": 0}, "steps and rounds"),
        ({"tau": -1.0}, "tau must be at least 0"),
        ({"tau": 0.0, "side": 3}, "side does nothing unless tau is not 0"),
        ({"limit": 0.0}, "limit above 0"),
    ],
)
def test_odd_settings_are_refused(bands: Classifier, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        strattack(bands, torch.empty(0, 3, 12, 12), torch.empty(0, dtype=torch.int64), **settings)
