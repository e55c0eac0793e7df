"""`sparsefool`: on a linear network the fewest values in one step; elsewhere few that fool."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from toys import Linear, late

from robusteval.models.classifier import Classifier, predict_classes
from robusteval.search.balls import quantise

if TYPE_CHECKING:
    from robusteval.attacks.sparsefool import sparsefool
else:
    sparsefool = late("robusteval.attacks.sparsefool", "sparsefool")


def test_on_a_linear_network_the_steepest_values_go_to_their_ends() -> None:
    """As many as it takes, of which none is spared; in order of slope, as the plane asks."""
    network = Linear((3, 5, 4), seed=2).requires_grad_(False)
    model = Classifier(network, num_classes=2).eval()
    x = quantise(0.3 + 0.4 * torch.rand(8, 3, 5, 4, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        y = predict_classes(model(x))
    side = (x * network.weight).flatten(1).sum(1) + network.bias
    weight = (network.weight * side.sign().view(-1, 1, 1, 1)).flatten(1)
    gains = torch.maximum(weight * x.flatten(1), weight * (x.flatten(1) - 1))
    order = weight.abs().argsort(1, descending=True)
    total = gains.gather(1, order).cumsum(1)
    expected = (total <= side.abs().unsqueeze(1)).sum(1) + 1

    x_adv = sparsefool(model, x, y, stretch=1.05, polish=0)

    with torch.no_grad():
        assert (predict_classes(model(x_adv)) != y).all()
    changed = (x_adv != x).flatten(1)
    assert (changed.sum(1) - expected).abs().max() <= 1
    for i in range(8):
        assert changed[i, order[i, : int(expected[i]) - 1]].all()


def test_a_longer_way_changes_more_and_pruning_less(bands: Classifier) -> None:
    x = quantise(torch.rand(6, 3, 12, 12, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        y = predict_classes(bands(x))
    counts = []
    for given in ({"stretch": 1.2, "polish": 0}, {"stretch": 5.0, "polish": 0}, {"stretch": 5.0}):
        x_adv = sparsefool(bands, x, y, **given)  # type: ignore[arg-type]
        with torch.no_grad():
            assert (predict_classes(bands(x_adv)) != y).all()
        assert torch.equal(quantise(x_adv), x_adv)
        counts.append((x_adv != x).flatten(1).sum(1))
    assert counts[0].sum() <= counts[1].sum()
    assert (counts[2] <= counts[1]).all()


@pytest.mark.parametrize("settings", [{"steps": 0}, {"stretch": 0.5}, {"polish": -1}])
def test_odd_settings_are_refused(bands: Classifier, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        sparsefool(bands, torch.empty(0, 3, 12, 12), torch.empty(0, dtype=torch.int64), **settings)
